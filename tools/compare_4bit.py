"""Compares ScaLoRA's carry on a 4-bit base with QLoRA, and with requantizing after every merge.

    python tools/compare_4bit.py --model_name_or_path MODEL --config launch/recipes/demo.yaml \
        --output_dir runs/compare_4bit --seeds 0 1 2

Trains in one process, each way with the same data, rank and learning rate. Writes results.json and
curves.svg. Options of launch/train.py may follow. A run that has its results file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import join
from scalora_dist.engines.layer_shards import LayerShards
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.layers.fourbit_linear import FourBitLinear, quantize
from scalora_dist.methods.merger import MergeTarget
from scalora_dist.training.run_log import read_history, write_json
from scalora_dist.training.trainer import Trainer

WAYS = {
    "QLoRA": {"method": "lora"},
    "ScaLoRA, carry": {"method": "scalora"},
    "ScaLoRA, requantized": {"method": "scalora"},
}
REQUANTIZED = "ScaLoRA, requantized"
SMOOTH = 5  # number of steps over which the drawn losses are averaged
LAST = 10  # number of steps in the table's loss at the end


class Requantized(MergeTarget):
    """Merges into the 4-bit W itself: dequantize, add, quantize again. Only for the comparison.

    Attributes:
        kept: for each merge, the part of the change by which W really moved; 1: all of it.
        noise: for each merge, the norm of W's other movement, relative to the change's norm.
    """

    def __init__(self, modules: dict[str, FourBitLinear]) -> None:
        self.modules = modules
        self.low_halves = {}
        self.kept: list[float] = []
        self.noise: list[float] = []

    def factor(self, layer: LayerShards) -> float:
        return layer.scaling

    def add(self, layer: LayerShards, left: Tensor, right: Tensor) -> None:
        module = self.modules[layer.name]
        before = module.dense(module.weight, torch.float32)
        change = left @ right.T
        codes, sizes = quantize(before + change, module.fourbit)
        module.weight.data.copy_(codes)
        module.sizes.copy_(sizes)
        if (size := change.square().sum()) > 0:
            moved = module.dense(module.weight, torch.float32) - before
            self.kept.append(float((moved * change).sum() / size))
            self.noise.append(float((moved - change).norm() / size.sqrt()))


def train(way: str, seed: int, folder: Path, argv: Sequence[str], world: World) -> dict[str, Any]:
    """Train once. Returns the losses of the steps and the content of summary.json.

    For requantizing also the medians of ``kept`` and ``noise``.
    """
    given = {**WAYS[way], "load_in_4bit": True, "seed": seed, "output_dir": folder}
    given |= {"overwrite_output_dir": True, "save_model": False, "save_steps": 0}
    options = parse_options([*argv, *(f"--{name}={value}" for name, value in given.items())])
    if options.launch.ds_config or options.launch.fsdp:
        raise UserError("this tool runs in one process: leave out --ds_config and --fsdp")
    trainer = Trainer(options, world)
    if way == REQUANTIZED:
        assert trainer.runner.merger is not None
        modules = {n: x for n, x in trainer.engine.adapted.items() if isinstance(x, FourBitLinear)}
        target = trainer.runner.merger.target = Requantized(modules)
    summary = trainer.run()
    lines = read_history(trainer.output_dir, trainer.feed.steps)
    found: dict[str, Any] = {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "summary": summary,
    }
    if way == REQUANTIZED:
        for name, values in (("kept", target.kept), ("noise", target.noise)):
            found[name] = float(torch.tensor(values).median())
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    steps = min(len(run["losses"]) for runs in results.values() for run in runs.values())
    rows = [
        f"| | loss, all {steps} steps | last {LAST} | held-out loss | exact match | rank of ΔW |"
    ]
    rows.append("|---|---|---|---|---|---|")
    for way, runs in results.items():
        losses = [run["losses"] for run in runs.values()]
        means = [sum(each) / len(each) for each in losses]
        ends = [sum(each[-LAST:]) / LAST for each in losses]
        told = [run["summary"] for run in runs.values()]
        held_out = [each["eval_loss"][1] for each in told]
        match = [100 * each["eval_exact_match"][1] for each in told]
        ranks = [rank for each in told for rank in each["update_rank"]]
        cells = [_spread(means, 2), _spread(ends, 3), _spread(held_out, 3)]
        cells.append(_spread(match, 0) + " %")
        cells.append(f"{min(ranks)} to {max(ranks)}" if ranks else "")
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw each way's training loss: smoothed, the mean over the seeds, and the seeds' range."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for way, runs in results.items():
        losses = torch.tensor([run["losses"] for run in runs.values()])
        smooth = losses.unfold(1, SMOOTH, 1).mean(dim=2)
        steps = range(SMOOTH, losses.shape[1] + 1)
        (line,) = axes.plot(steps, smooth.mean(0), label=way)
        axes.fill_between(
            steps, smooth.amin(0), smooth.amax(0), alpha=0.2, color=line.get_color(), linewidth=0
        )
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTH} steps", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, others = parser.parse_known_args(argv)
    world = join(parse_options([*others, "--output_dir", str(args.output_dir)]))
    if world.size > 1:
        raise UserError("this tool runs in one process: start it with python")
    results: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    for seed in args.seeds:
        for way in WAYS:
            name = f"{way.lower().replace(', ', '-')}-{seed}"
            found = args.output_dir / f"{name}.json"
            if not found.exists():
                logging.info("%s, seed %d", way, seed)
                run_folder = args.output_dir / name
                write_json(found, train(way, seed, run_folder, others, world))
            results[way][str(seed)] = json.loads(found.read_text())
    write_json(args.output_dir / "results.json", results)
    draw(results, args.output_dir / "curves.svg")
    print(table(results))
    world.leave()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_with_one_sentence():
        run(sys.argv[1:])
