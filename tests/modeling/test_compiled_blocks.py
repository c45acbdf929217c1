"""Which compiler a run with compiled blocks needs. tests/e2e/test_compile.py trains with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalora_dist.errors import UserError
from scalora_dist.modeling.compiled_blocks import check_compiler


@pytest.mark.parametrize(
    ("device", "installed", "environment", "missing"),
    [
        ("cpu", ["gcc", "clang"], {}, "C++ compiler on CPUs: install g++"),
        ("cpu", ["g++"], {}, None),
        ("cuda", ["g++"], {}, "C compiler on GPUs: install gcc"),
        ("cuda", ["clang"], {}, None),
        ("cuda", ["gcc"], {}, None),
        ("cuda", ["gcc"], {"CC": "no-such-compiler"}, "C compiler on GPUs"),
        ("cuda", ["mine"], {"CC": "mine"}, None),
    ],
)
def test_the_compiler_that_torch_will_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    installed: list[str],
    environment: dict[str, str],
    missing: str | None,
) -> None:
    for name in installed:
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    # One rank, which may have a GPU that this machine lacks.
    world: Any = SimpleNamespace(device=torch.device(device), max=lambda value: [value])
    if missing is None:
        check_compiler(world)
        return
    with pytest.raises(UserError) as refused:
        check_compiler(world)
    assert missing in str(refused.value)
