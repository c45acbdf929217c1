"""The table of counts of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence
from tests.support.tiny_models import save_task
from tools import count_kernels


@pytest.mark.parametrize("engine", ["local", "zero1", "fsdp"])
def test_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    model, out = save_task(tmp_path / "model"), tmp_path / "counts.json"
    nodes = "" if engine == "local" else "--nodes 2"
    words = f"--model_name_or_path {model} {nodes} --engine {engine} --json {out} --rank 4"
    count_kernels.main([*words.split(), "--dataset", str(model / "texts.jsonl")])
    printed = capsys.readouterr().out
    assert f"{engine}, {1 if engine == 'local' else 16} rank(s)" in printed
    found = json.loads(out.read_text())
    assert f"| rescale: merge | {sum(found['rescale: merge']['kernels'].values()):,} |" in printed
    whole, added = (
        sum(found[part]["kernels"].values())
        for part in (count_kernels.MICRO_BATCH, count_kernels.ADAPTERS)
    )
    assert 0 < added < whole
    assert found["AdamW"]["read"] > 0


def test_mistakes() -> None:
    others = ["zero9", "zero3 --ds_config zero1", "local --fsdp", "local --nodes 2"]
    others += ["fsdp --torch_compile"]
    four_bits = "zero3 --method lora --load_in_4bit"
    given = [f"--model_name_or_path x --engine {words}" for words in (*others, four_bits)]
    for words in (*given, "--engine zero3"):
        with pytest.raises(UserError) as error:
            count_kernels.main(words.split())
        assert one_sentence(error)
