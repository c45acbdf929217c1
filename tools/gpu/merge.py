"""Part merge: how fast W takes a merge, beside a copy on the same device in the same run.

On a GPU a merge is a Triton kernel. PyTorch's operators, which it replaces there, are timed too.
Both must give the same bits where sums are exact.

For each shape of Gemma-3-12B's projections, kind of weight and rank r. The least bytes of a merge
are those of W, read and written once: 8 a weight in `split` (2 for the weight and 2 for its low
half), 4 in `nearest`, 8 in float32. Rates are these bytes over the time. Each timed call merges
into so many weights that no cache holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from scalora_dist.config.method import MergeRounding
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.split_precision import add_low_rank_, add_with_pytorch_
from scalora_dist.methods.merger import IntoWeights
from scalora_dist.training.run_log import write_json
from tools.gpu.gemma import projection_shapes, random_layers, text_config
from tools.gpu.part import run_part

KINDS: dict[str, tuple[torch.dtype, MergeRounding, int]] = {  # dtype, rounding, least bytes
    "split": (torch.bfloat16, "split", 8),
    "nearest": (torch.bfloat16, "nearest", 4),
    "fp32": (torch.float32, "nearest", 8),
}
RANKS = (8, 16, 64)
SMOKE_RANKS = (8,)
SHARDED: Any = object()  # stands for a group: merges send nothing
WORKING_SET = 2**30  # bytes: several times any GPU's cache


def seconds_of(work: Callable[[], Any], seconds: float) -> float:
    """The median time of a call, on an idle device. Measures for about ``seconds``."""
    work()
    timer = Timer("work()", globals={"work": work})  # waits for the device, if it is a GPU
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def copy_rate(device: torch.device, size: int, seconds: float) -> float:
    """Bytes/s, read and written, of a copy of ``size`` bytes."""
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), seconds)


def merge_times(
    shape: tuple[int, int], kind: str, rank: int, device: torch.device, size: int, seconds: float
) -> tuple[float, float]:
    """Seconds of one merge into one weight, as the mean over ``size`` bytes of weights.

    Returns:
        (as a run does it, by PyTorch's operators).
    """
    dtype, rounding, least = KINDS[kind]
    count = max(1, size // (shape[0] * shape[1] * least // 2))
    weights = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    layers = list(random_layers(weights, rank, torch.Generator(device).manual_seed(0)))
    target = IntoWeights(layers, rounding)
    factors = [(x.A.local.view(-1, rank), x.B.local.view(-1, rank)) for x in layers]

    def merge_all() -> None:
        for layer, (left, right) in zip(layers, factors, strict=True):
            target.add(layer, left, right)

    def pytorch_all() -> None:
        for layer, (left, right) in zip(layers, factors, strict=True):
            low = target.low_halves.get(f"{layer.name}.weight")
            add_with_pytorch_(layer.W, left, right, low)

    return seconds_of(merge_all, seconds) / count, seconds_of(pytorch_all, seconds) / count


def other_bits(shape: tuple[int, int], kind: str, rank: int, device: torch.device) -> int:
    """How many numbers of W or its low half differ between a run's merge and PyTorch's operators.

    The range begins and ends inside a row. Factors have so few bits that all sums are exact.
    """
    dtype, rounding, _ = KINDS[kind]
    generator = torch.Generator(device).manual_seed(rank)
    left, right = (
        torch.randint(-3, 9, (n, rank), generator=generator, device=device) * 2.0**-10
        for n in shape
    )
    begin, end = shape[1] // 2, shape[0] * shape[1] - shape[1] // 3
    numbers = torch.randn(end - begin, generator=generator, device=device)
    values, lows = numbers.to(dtype), (2**14 * numbers).clamp(-(2**15), 2**15 - 1).to(torch.int16)
    found = []
    for merge in (add_low_rank_, add_with_pytorch_):
        local, low = values.clone(), lows.clone()
        merge(
            FlatShard(local, begin, shape, SHARDED),
            left,
            right,
            low if rounding == "split" else None,
        )
        found.append((local, low))
    return sum(int((ours != theirs).sum()) for ours, theirs in zip(*found, strict=True))


@torch.no_grad()
def measure(file: Path, *, smoke: bool) -> None:
    """Measure, and write ``file`` anew after each kind and rank."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, seconds = (2**20, 0.01) if smoke else (WORKING_SET, 0.2)
    config = text_config(smoke=smoke)
    shapes = projection_shapes(config)
    copy = copy_rate(device, size, seconds)
    print(f"copy on {device}: {copy / 1e9:.0f} GB/s, read and written", flush=True)
    rows: list[dict[str, Any]] = []
    for kind, (_, _, least) in KINDS.items():
        for rank in SMOKE_RANKS if smoke else RANKS:
            both = {
                shape: merge_times(shape, kind, rank, device, size, seconds)
                for shape in sorted({*shapes.values()})
            }
            times = {shape: ours for shape, (ours, _) in both.items()}
            every, pytorch = (
                config.num_hidden_layers * sum(both[shape][way] for shape in shapes.values())
                for way in (0, 1)
            )
            moved = config.num_hidden_layers * sum(least * m * n for m, n in shapes.values())
            rows.append(
                {
                    "kind": kind,
                    "rank": rank,
                    "model_seconds": every,
                    "pytorch_seconds": pytorch,
                    "other_bits": sum(other_bits(shape, kind, rank, device) for shape in times),
                    "model_bytes": moved,
                    "of_copy": moved / every / copy,
                    "shapes": {
                        f"{m}x{n}": {"seconds": t, "of_copy": least * m * n / t / copy}
                        for (m, n), t in times.items()
                    },
                }
            )
            write_json(file, {"copy_bytes_per_second": copy, "rows": rows})
            assert not rows[-1]["other_bits"], "the kernel's bits are not those of PyTorch"
            print(
                f"{kind:>8}, r = {rank:<2}: all {len(shapes) * config.num_hidden_layers} weights "
                f"{1e3 * every:.1f} ms, {moved / every / 1e9:.0f} GB/s, "
                f"{moved / every / copy:.0%} of a copy; PyTorch's operators {1e3 * pytorch:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    run_part(__doc__, measure)
