"""The checkpoint bench on real ranks of a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import launched

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def figures(tiny_model: str, tmp_path: Path) -> dict[str, float]:
    """What two rounds on two ranks give."""
    out = tmp_path / "figures.json"
    words = f"""--rounds 2 --json {out} --fsdp --model_name_or_path {tiny_model}
        --dataset reasoning_gym:chain_sum --dataset_size 32 --max_steps 9
        --output_dir {tmp_path / "run"}""".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    done = subprocess.run(
        [*torchrun, "2", "tools/bench_checkpoint.py", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | launched.ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert "training stands still" in done.stdout
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    return json.loads(out.read_text())


@pytest.mark.heavy
def test_every_byte_is_written_once(figures: dict[str, float]) -> None:
    assert figures["world_size"] == 2
    # Beside the tensors: headers, state.json and manifest.json, tens of kilobytes.
    overhead = figures["bytes_written"] - figures["bytes_of_state"]
    assert 0 < overhead < 100_000
    assert min(figures[name] for name in ("step", "save", "write")) > 0


def test_a_mistake_is_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench_checkpoint.py", "--rounds", "0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: set --rounds")
