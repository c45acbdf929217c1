"""Measures how far a frozen weight drifts over many merges in fp32, bf16 split and bf16 nearest.

    python tools/merge_drift.py --model_name_or_path MODEL [--merges 1 100 1000] [--json out.json]

The tool runs a real training in one process, with a rescale before every step. It uses the demo's
recipe with one example per step, and passes on other options of launch/train.py. It selects the
linear layers of a few decoder blocks, and copies their weights, rounded to bf16. Each merge into
these layers is also merged into the copies, by the project's own `add_low_rank_`. The reference
adds the same in float64. No increments are replayed: real ones differ and have both signs (as
1 − α∘β has). Repeating a few of them, with random signs or in pairs, would make `nearest` look too
good.

    stored drift    ‖W − W_ref‖ / ‖W_ref − W_0‖ of the stored number (for split: both halves),
                    relative to the update accumulated so far
    forward drift   ‖(W − W_ref) x‖ / ‖W_ref x‖ of the weight that the forward reads (for split:
                    the bf16 half), in exact arithmetic, on inputs x of the layer in training

The last row is the reference, rounded to bf16 once: no bf16 weight can be expected to do better.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scalora_dist.config.option import JsonFile, tool_option
from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import Parser
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.scale_solver import Scales
from scalora_dist.core.split_precision import add_low_rank_, join_halves, zero_low_half
from scalora_dist.engines.build import join
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.profiling.clock import Clock
from scalora_dist.profiling.versions import installed_versions
from scalora_dist.training.run_log import write_json
from scalora_dist.training.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "demo.yaml"
INPUTS = 64  # number of a layer's inputs (tokens) that are kept
FIGURES = ("stored", "forward", "update")  # figures that are aggregated over layers
ONCE = "reference, rounded once"


@dataclass(frozen=True)
class DriftArguments(JsonFile):
    _argument_group_name = "drift"

    merges: list[int] = tool_option([1, 100, 1000], "After how many merges to measure.", at_least=1)
    blocks: int = tool_option(
        3, "Decoder blocks, spread over the model, whose layers are measured.", at_least=1
    )


class Stored:
    """A weight that is stored in one of the compared ways.

    Attributes:
        shard: the weight (m, n).
        low: low halves, int16, 1-D; None: not split.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, split: bool = False) -> None:
        rows, cols = weight.shape
        self.shard = FlatShard(weight.to(dtype, copy=True).view(-1), 0, (rows, cols))
        self.low = zero_low_half(self.shard) if split else None

    def forward(self) -> Tensor:
        """The weight that a forward reads, (m, n)."""
        return self.shard.local.view(self.shard.shape)

    def value(self) -> Tensor:
        """The stored weight, (m, n), with both halves if it is split."""
        high = self.forward()
        return high if self.low is None else join_halves(high, self.low.view_as(high))

    def bytes_per_weight(self) -> list[int]:
        """Bytes per weight of each stored tensor."""
        kept = [self.shard.local] if self.low is None else [self.shard.local, self.low]
        return [tensor.nbytes // self.shard.local.numel() for tensor in kept]


class Layer:
    """One adapted layer's weight, stored in every way, and the float64 reference.

    Attributes:
        ways: {name of the way: stored weight}.
        start: the weight before any merge, (m, n) float64.
        reference: the weight with all merges, (m, n) float64.
        inputs: inputs of the layer in the latest forward, (k, n), any float dtype.
        merges: number of merges so far.
    """

    def __init__(self, weight: Tensor) -> None:
        """Start all ways and the reference at ``weight`` (m, n), rounded to bfloat16."""
        weight = weight.to(torch.bfloat16)
        self.ways = {
            "fp32": Stored(weight, torch.float32),
            "bf16, split": Stored(weight, torch.bfloat16, split=True),
            "bf16, nearest": Stored(weight, torch.bfloat16),
        }
        self.start = weight.double()
        self.reference = weight.double()
        self.inputs = weight[:0]
        self.merges = 0

    def keep_inputs(self, module: nn.Module, x: tuple[Tensor]) -> None:
        self.inputs = x[0].detach().flatten(0, -2)[:INPUTS].clone()

    def merge(self, left: Tensor, right: Tensor) -> None:
        """``W += left @ rightᵀ`` in every way; left (m, r) and right (n, r), float32."""
        for way in self.ways.values():
            add_low_rank_(way.shard, left, right, way.low)
        self.reference.addmm_(left.double(), right.double().T)
        self.merges += 1

    def measure(self) -> list[dict[str, Any]]:
        """Measure the drifts: one row per way. ``update`` is ‖W_ref − W_0‖ / ‖W_0‖."""
        x, rows = self.inputs.double().T, []
        update, y = (self.reference - self.start).norm(), (self.reference @ x).norm()
        for name, way in (self.ways | {ONCE: Stored(self.reference, torch.bfloat16)}).items():
            stored, forward = (w.double() - self.reference for w in (way.value(), way.forward()))
            drifts = (stored.norm() / update, (forward @ x).norm() / y, update / self.start.norm())
            row = {"merges": self.merges, "way": name, "bytes": way.bytes_per_weight()}
            rows.append(row | dict(zip(FIGURES, map(float, drifts), strict=True)))
        return rows


class Watcher:
    """Repeats a trainer's merges on copies of a few of its layers, and measures the copies.

    Attributes:
        layers: {name: copies of the layer's weight}.
        at: numbers of merges after which to measure.
        rows: measurements, one per layer, number of merges and way.
        merge: the trainer's own merge.
    """

    def __init__(self, trainer: Trainer, blocks: int, merges: Sequence[int]) -> None:
        rescaler = trainer.runner.transform
        assert isinstance(rescaler, Rescaler)
        shards = {layer.name: layer.W for layer in trainer.engine.layer_shards(gradients=False)}
        self.layers = {
            name: Layer(shards[name].local.view(shards[name].shape))
            for name in spread_over_blocks(list(shards), blocks)
        }
        for name, layer in self.layers.items():
            trainer.model.get_submodule(name).register_forward_pre_hook(layer.keep_inputs)
        self.at = merges
        self.rows = list[dict[str, Any]]()
        self.merge = rescaler.merge
        # mypy allows no assignment to a method.
        rescaler.merge = self  # type: ignore[assignment,method-assign]

    def __call__(self, shards: Sequence[LayerShards], scales: Scales, clock: Clock) -> None:
        """Called instead of ``Rescaler.merge``: merge into the copies, then call the original."""
        for shard, alpha, beta in zip(shards, scales.alpha, scales.beta, strict=True):
            if layer := self.layers.get(shard.name):
                a, b = (factor.local.view(factor.shape) for factor in (shard.A, shard.B))
                left = a * (shard.scaling * (1 - alpha * beta)).to(a)
                # Rescales before the first step with a learning rate have A = 0. They do not count.
                if layer.merges or left.any():
                    layer.merge(left, b)
                    if layer.merges in self.at:
                        self.rows += [{"layer": shard.name, **row} for row in layer.measure()]
        self.merge(shards, scales, clock)


def spread_over_blocks(names: Sequence[str], count: int) -> list[str]:
    """The layers of ``count`` evenly spaced blocks, with the first and the last block.

    Args:
        names: names of layers; the first number in a name is its block.
        count: number of blocks.
    """
    block_of = {name: next(filter(str.isdigit, name.split(".")), "") for name in names}
    blocks = list(dict.fromkeys(block_of.values()))
    count = min(count, len(blocks))
    chosen = {blocks[i * (len(blocks) - 1) // max(1, count - 1)] for i in range(count)}
    return [name for name in names if block_of[name] in chosen]


def over_layers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Aggregate over layers: each figure's median, and its largest value as ``max_…``.

    Returns one row per number of merges and way.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["merges"], row["way"]), []).append(row)
    return [
        group[0]
        | {key: median(row[key] for row in group) for key in FIGURES}
        | {f"max_{key}": max(row[key] for row in group) for key in FIGURES}
        for group in groups.values()
    ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The medians as a Markdown table, with one line per way."""
    counts = sorted({row["merges"] for row in rows})
    heads = ["", "bytes per weight"]
    heads += [f"{key} drift, {count}" for key in ("stored", "forward") for count in counts]
    lines = [heads, ["---"] * len(heads)]
    for way in dict.fromkeys(row["way"] for row in rows):
        of_way = [row for row in rows if row["way"] == way]
        figures = [row[key] for key in ("stored", "forward") for row in of_way]
        size = " + ".join(map(str, of_way[0]["bytes"]))
        lines.append([way, size, *(f"{figure:.1e}" for figure in figures)])
    updates = {row["merges"]: f"{row['update']:.1%} after {row['merges']}" for row in rows}
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nMedians over the layers; the update, of W: {', '.join(updates.values())}."


def watch(argv: Sequence[str], args: DriftArguments) -> tuple[Watcher, dict[str, Any]]:
    """Train in this process. Returns the watcher with its measurements, and the run's options."""
    with tempfile.TemporaryDirectory(prefix="merge_drift-") as folder:
        # Two more steps: A = 0 in the first rescale, and in the next if warm-up starts at rate 0.
        given = {"config": RECIPE, "output_dir": folder, "max_steps": max(args.merges) + 2}
        given |= {"per_device_train_batch_size": 1, "eval_size": 0, "update_rank_layers": 0}
        given |= {"save_steps": 0, "save_model": False}
        options = parse_options([*(f"--{name}={value}" for name, value in given.items()), *argv])
        if options.method.name != "scalora":
            raise UserError(f"--method {options.method.name} rescales nothing: leave it out")
        if options.launch.ds_config or options.launch.fsdp:
            raise UserError("this tool runs in one process: leave out --ds_config and --fsdp")
        world = join(options)
        trainer = Trainer(options, world)
        watcher = Watcher(trainer, args.blocks, args.merges)
        trainer.run()
        world.leave()
    fewest = min(layer.merges for layer in watcher.layers.values())
    if fewest < max(args.merges):
        raise UserError(f"only {fewest} rescales merged anything: set --max_steps higher")
    return watcher, {**asdict(options.method), **asdict(options.train)}


def run(argv: list[str]) -> None:
    parser = Parser([DriftArguments], allow_abbrev=False, description=__doc__.partition("\n")[0])
    args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    watcher, settings = watch(rest, args)
    rows = over_layers(watcher.rows)
    print(render(rows))
    if args.json:
        cuda = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
        result = {
            "device": f"{device}, {torch.get_num_threads()} threads",
            "versions": installed_versions("torch", "transformers"),
            "settings": {**settings, **asdict(args)},
            "over_layers": rows,
            "layers": watcher.rows,
        }
        write_json(Path(args.json), result)


if __name__ == "__main__":
    # torch renamed a collective. Releases before 2.13 have only the old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with exit_with_one_sentence():
        run(sys.argv[1:])
