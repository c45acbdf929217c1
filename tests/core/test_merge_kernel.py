"""The Triton kernel of a merge: its numbers by Triton's interpreter, its bytes, its launches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scalora_dist.core import merge_kernel, split_precision
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.merge_kernel import bytes_moved, merge_range_
from scalora_dist.core.split_precision import add_low_rank_, zero_low_half
from tests.support.no_gpu import NoGPU, no_gpu

ROOT = Path(__file__).parents[2]
CUT: Any = object()  # merges are local: the group is never used
# (rows, cols) of the projections of Gemma-3-12B: q, k and v, o, gate and up, down.
GEMMA_12B = [(4096, 3840), (2048, 3840), (3840, 4096), (15360, 3840), (3840, 15360)]
LEAST = {"split": 8, "nearest": 4, "fp32": 8}  # bytes of a weight, read and written once


# --- numbers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What tests/support/workers/interpreted_merge.py found."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.workers.interpreted_merge"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_merge_is_float64s_but_for_rounding(interpreted: dict[str, Any]) -> None:
    """fp32, nearest and split, over ranges with part rows, in one row and empty ones."""
    errors = interpreted["error"]
    assert len(errors) == 50 and max(errors.values()) > 0.1  # the bound is no idle one
    assert not {case: error for case, error in errors.items() if not error <= 1}


def test_a_merge_has_pytorchs_bits_where_sums_are_exact(interpreted: dict[str, Any]) -> None:
    same = interpreted["same"]
    assert len(same) == 46 and not [case for case, equal in same.items() if not equal]


def test_every_16_bit_number_is_rounded_as_pytorch_does(interpreted: dict[str, Any]) -> None:
    """Ties, subnormals, the largest numbers, infinities, NaN and zeros of both signs."""
    for case, found in interpreted["every number"].items():
        assert found["numbers"] > 60_000 and found["infinities"], case
        wrong = {key: found[key] for key in ("other bits", "other low bits", "not NaN")}
        assert not any(wrong.values()), (case, wrong)


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize("ranks", [1, 16, 1024])
@pytest.mark.parametrize("shape", GEMMA_12B)
def test_a_merge_moves_few_bytes_beyond_the_least(
    shape: tuple[int, int], ranks: int, kind: str
) -> None:
    """At r = 8, without a cache. A rank of 1024 has 2 to 15 rows, and needs the whole of B."""
    (rows, cols), rank = shape, 8
    share = rows * cols // ranks
    for offset in (0, share * (ranks - 1)):
        touched = -(-(offset % cols + share) // cols)
        least = LEAST[kind] * share
        if ranks == 1024:
            least += 4 * rank * (touched + cols)  # its rows of A, and B
        assert bytes_moved(offset, share, cols, rank, LEAST[kind]) <= 1.25 * least


def test_bytes_are_counted_tile_by_tile() -> None:
    """Against a count of the elements that each program's masks let through."""
    rows, cols, rank = 300, 200, 3
    for low, high in [(0, rows * cols), (777, 51_111), (230, 390), (64, 64)]:
        first = low // cols
        touched = -(-high // cols) - first if high > low else 0
        factors = 0
        for row in range(0, touched, merge_kernel.ROWS):
            for col in range(0, cols, merge_kernel.COLS):
                factors += min(merge_kernel.ROWS, touched - row)  # rows of left
                factors += min(merge_kernel.COLS, cols - col)  # rows of right
        counted = 8 * (high - low) + 4 * rank * factors
        assert bytes_moved(low, high - low, cols, rank, 8) == counted


# --- launches ------------------------------------------------------------------------------------


def launch(
    driver: NoGPU,
    shape: tuple[int, int] = (256, 192),
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    *,
    split: bool = True,
    span: tuple[int, int] | None = None,
) -> None:
    low, high = span or (0, shape[0] * shape[1])
    weight = torch.zeros(high - low, dtype=dtype)
    lows = torch.zeros_like(weight, dtype=torch.int16) if split else None
    merge_range_(
        weight, lows, torch.zeros(shape[0], rank), torch.zeros(shape[1], rank), low, shape[1]
    )


def assembly(capability: int) -> str:
    """PTX of the kernel that was compiled last for this GPU."""
    kernels = [*merge_kernel._add_low_rank.device_caches[capability][0].values()]
    return kernels[-1].asm["ptx"]


@pytest.fixture(autouse=True)
def cache_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


KINDS = [
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float32, False),
    pytest.param(torch.float16, True, marks=pytest.mark.heavy),
    pytest.param(torch.float16, False, marks=pytest.mark.heavy),
]


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.heavy) for c in (80, 100))]
)
@pytest.mark.parametrize(("dtype", "split"), KINDS)
def test_it_compiles_with_accesses_of_16_bytes(
    capability: int, dtype: torch.dtype, split: bool
) -> None:
    with no_gpu(capability) as driver:
        launch(driver, dtype=dtype, split=split)
    assert len(driver.launched) == 1
    accesses = set(re.findall(r"(?:ld|st)\.global[.\w]*", assembly(capability)))
    # W and its low halves by 16 bytes, pairs of a factor's numbers by 8.
    assert accesses == {"ld.global.v4.b32", "ld.global.b64", "st.global.v4.b32"}
    assert "tf32" not in assembly(capability) and "fma.rn.f32" in assembly(capability)


@pytest.mark.parametrize(
    "rank", [1, 3, *(pytest.param(r, marks=pytest.mark.heavy) for r in (16, 64, 256))]
)
def test_it_compiles_for_other_ranks_and_ranges(rank: int) -> None:
    with no_gpu(90) as driver:
        launch(driver, rank=rank, span=(777, 20_001))
    assert len(driver.launched) == 1 and "st.global.b16" in assembly(90)


def test_a_merge_is_one_launch_and_models_compile_it_once() -> None:
    """Every shape and range of one dtype and rank runs the same compiled kernel."""
    with no_gpu(90) as driver:
        launch(driver, rank=6)
        compiled = len(merge_kernel._add_low_rank.device_caches[90][0])
        for shape, span in [((64, 4096), None), ((1, 8), None), ((512, 64), (64, 9000))]:
            launch(driver, shape, rank=6, span=span)
        launch(driver, span=(64, 64))  # an empty range: nothing is launched
        assert len(driver.launched) == 4
        assert len(merge_kernel._add_low_rank.device_caches[90][0]) == compiled


def test_a_gpus_shard_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors: the operator is all that is called."""
    monkeypatch.setattr(merge_kernel, "problem", lambda: None)  # there is no GPU to compile for
    monkeypatch.setattr(split_precision, "_kernel", split_precision._kernel.__wrapped__)
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        local = torch.zeros(500, dtype=torch.bfloat16, device="cuda")
        shard = FlatShard(local, 17, (31, 24), CUT)
        low = zero_low_half(shard)
        left, right = torch.zeros(31, 3, device="cuda"), torch.zeros(24, 3, device="cuda")
        with Watch():
            add_low_rank_(shard, left, right, low)
    assert low.device == local.device
    assert [op for op in called if op.namespace != "prim"] == [merge_range_]


def test_where_triton_cannot_compile_pytorch_merges(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def get_current_device(self) -> int:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(triton.runtime.driver, "_active", Broken())
    with caplog.at_level("WARNING"):
        assert split_precision._kernel.__wrapped__() is None
    (record,) = caplog.records
    assert "(Failed to find C compiler.)" in record.getMessage()
