"""Indexes of models in several files, and those that are refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.modeling.index_files import NAMES, check_index_files, weight_map
from tests.support import tiny_models, tiny_runs


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def index(weight_map: Any) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def test_names_in_the_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "snapshot").mkdir()
    files = {"a": "model-00001.safetensors", "b": "part/é..2.safetensors", "c": "./x"}
    for name in NAMES:
        (tmp_path / "snapshot" / name).write_text(index(files))
    (tmp_path / "snapshot" / files["a"]).symlink_to("../blob")
    check_index_files(tmp_path / "snapshot")
    assert weight_map(tmp_path / "snapshot" / NAMES[0]) == files


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *(
            (index({"a": "x", "b": file}), f"names {file!r}, which is not in its folder")
            for file in ("/etc/passwd", "../x", "a/../../x", "..", "a\nb", "a\0b")
        ),
        (index({"a": ["x"]}), "has no weight_map of file names"),
        (index({"a": ""}), "has no weight_map of file names"),
        (index(["x"]), "has no weight_map of file names"),
        ("{}", "has no weight_map of file names"),
        ("[]", "has no weight_map of file names"),
        (json.dumps({"weight_map": {"a": "x"}}), "has no metadata"),
        ("[" * 100_000, "is nested too deeply"),
        ("{", ""),
    ],
)
def test_an_index_is_refused_in_one_sentence(
    ranks: Any, task: Path, tmp_path: Path, name: str, text: str, reason: str
) -> None:
    """Status 2, before the files that it names are looked for."""
    folder = shutil.copytree(task, tmp_path / "task")
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    case = tiny_runs.options(folder, tmp_path / "run", "local", method="lora")
    ((message, status, _),) = ranks(1).run(tiny_runs.refusal, case)
    assert status == 2 and "\n" not in message
    expected = f"{name} {reason}" if reason else ""
    assert message.startswith(f"--model_name_or_path {folder} cannot be loaded: {expected}")
