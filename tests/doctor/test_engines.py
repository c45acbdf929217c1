"""An engine that trains right, to other numbers, or not at all, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.workers import doctor as work


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("right", "ok    ZeRO-3          3 steps, losses and gradient norms within "),
        ("wrong", "FAIL  ZeRO-3          3 steps, losses and gradient norms within 1e-02 "),
        ("raises", "): ValueError: no kernel"),
    ],
)
def test_an_engine(ranks: Any, tmp_path: Path, how: str, says: str) -> None:
    """Against FSDP2's run of the same model."""
    (failed, text), _ = ranks(2).run(work.engine, tmp_path, how)
    assert failed == (how != "right")
    assert says in text
