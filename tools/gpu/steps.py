"""Parts step and ranks: steps of a random Gemma-3-12B, each run in processes of its own.

A step has 64 examples of 256 tokens, by accumulation, in bfloat16 with checkpointing. Where the
memory does not hold 48 blocks, the model has fewer: as many as ScaLoRA's plan says.

Part step compares LoRA, ScaLoRA, PEFT's LoRA and ScaLoRA on NF4 on one rank. Part ranks takes
ScaLoRA's steps on 1, 2 and all GPUs under ZeRO-3 and FSDP2, with the same global batches, and
compares losses and gradient norms with one rank's.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.planner import Planner
from scalora_dist.training.run_log import write_json
from tools.gpu.gemma import save_config, save_weights, text_config
from tools.gpu.step import WARM_UP, WAYS, options_of, step_parser
from tools.loss_compare import save_texts

PEFT = "peft-alone"  # the way of tools/gpu/peft_step.py
LEFT_ALONE = 6 * 2**30  # bytes for CUDA, and what the allocator cannot use
BLOCKS = (48, 36, 24, 12, 6, 3, 1)
ENGINES = ("zero3", "fsdp")  # of part ranks; the small form takes the first
SMOKE = {"steps": 2, "examples": 4, "micro_batch": 2, "length": 16}


class Runs:
    """Runs steps in other processes and collects their figures in one file.

    Attributes:
        file: JSON file of all figures so far, written anew after each run.
        sizes: the words of a step's sizes.
        found: what ``file`` holds.
    """

    def __init__(self, file: Path, sizes: dict[str, int], model: dict[str, Any]) -> None:
        self.file = file
        self.sizes = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        self.found: dict[str, Any] = {"model": model, "sizes": sizes, "rows": {}}

    def run(self, name: str, module: str, words: list[str], folder: Path, ranks: int = 1) -> None:
        """Run ``module`` on so many ranks. Its figures, or the end of its output, become a row."""
        result = folder / "figures.json"
        result.unlink(missing_ok=True)
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += ["torch.distributed.run", "--nproc_per_node", str(ranks), "-m"]
        command = [*start, f"tools.gpu.{module}", *words, "--folder", str(folder)]
        command += ["--json", str(result), *self.sizes]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode == 0 and result.exists():
            row = with_medians(json.loads(result.read_text()))
            print(f"{name}: {shown(row)}", flush=True)
        else:
            lines = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
            row = {"error": lines[-1], "output": lines[-30:]}
            print("\n".join([f"{name}: FAILED", *lines[-30:]]), flush=True)
        self.found["rows"][name] = row
        write_json(self.file, self.found)


def with_medians(row: dict[str, Any]) -> dict[str, Any]:
    """A run's figures with the medians of its steps with a rescale and without one."""
    rescaled = row.get("rescaled", [False] * len(row["seconds"]))
    for name, wanted in (("plain", False), ("rescale", True)):
        times = [t for t, is_so in zip(row["seconds"], rescaled, strict=True) if is_so == wanted]
        if times:
            row[f"{name}_seconds"] = median(times)
    row["tokens_per_second"] = row["tokens"] / row["plain_seconds"]
    if row.get("flops"):
        row["tflops"] = row["flops"] / row["plain_seconds"] / 1e12
        if row["peak_tflops"]:
            row["mfu"] = row["tflops"] / row["peak_tflops"]
    return row


def shown(row: dict[str, Any]) -> str:
    text = f"{1e3 * row['plain_seconds']:.1f} ms a step"
    if "rescale_seconds" in row:
        text += f", {1e3 * row['rescale_seconds']:.1f} with a rescale"
    text += f", {row['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in row:
        text += f", MFU {row['mfu']:.1%}"
    text += f", peak {row['peak_bytes'] / 1e9:.2f} GB"
    return text + (f" (planned {row['planned_bytes'] / 1e9:.2f})" if "planned_bytes" in row else "")


def make_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the largest model that fits, and texts. Returns what it is."""
    on_gpu = torch.cuda.is_available()
    room = torch.cuda.get_device_properties(0).total_memory - LEFT_ALONE if on_gpu else 0
    for blocks in (None,) if args.smoke else BLOCKS:
        config = text_config(smoke=args.smoke, blocks=blocks)
        save_config(folder, config)
        options = options_of("scalora", folder, folder, args)
        plan = Planner(options, PlanArguments()).plan(options, 1)
        if not on_gpu or plan.peak.total < room:
            break
    steps = WARM_UP + args.steps
    long = args.length + 8  # each text is cut to one length
    count = args.examples * steps
    save_texts(folder, string.ascii_letters, shortest=long, longest=long + 1, count=count)
    print(f"a random Gemma-3 with {config.num_hidden_layers} blocks is written", flush=True)
    save_weights(folder, config, torch.device("cuda" if on_gpu else "cpu"))
    return {
        "blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def compare_ways(runs: Runs, folder: Path, ways: list[str], engine: str) -> None:
    for way in ways:
        if way != PEFT:
            runs.run(way, "step", [way, "--engine", engine], folder)
        elif engine in ("local", "fsdp"):
            print(f"{PEFT}: left out, it is for DeepSpeed (--engine zero2)", flush=True)
        else:
            runs.run(way, "peft_step", ["--engine", engine], folder)


def compare_ranks(runs: Runs, folder: Path, engines: Sequence[str], most: int) -> None:
    for engine in engines:
        # Powers of two: each takes the same number of examples.
        for ranks in sorted({1, min(2, most), 1 << (most.bit_length() - 1)}):
            name = f"{engine}, {ranks} rank(s)"
            runs.run(name, "step", ["scalora", "--engine", engine], folder, ranks)
            one, row = runs.found["rows"][f"{engine}, 1 rank(s)"], runs.found["rows"][name]
            if ranks == 1 or "error" in one or "error" in row:
                continue
            for figure in ("losses", "grad_norms"):
                pairs = zip(row[figure], one[figure], strict=True)
                row[f"{figure}_off"] = max(abs(mine - alone) / alone for mine, alone in pairs)
            write_json(runs.file, runs.found)
            print(
                f"{name}: losses within {row['losses_off']:.1e} of one rank's, gradient norms "
                f"within {row['grad_norms_off']:.1e}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--engine", default="zero2", help="of part step")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, PEFT], default=[*WAYS, PEFT])
    parser.add_argument("--ranks", type=int, help="part ranks: on at most so many ranks")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    sizes = {name: step_parser(None).get_default(name) for name in SMOKE}
    sizes = SMOKE if args.smoke else sizes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vars(args).update(sizes)
        runs = Runs(args.json, sizes, make_model(folder, args))
        if args.ranks:
            compare_ranks(runs, folder, ENGINES[:1] if args.smoke else ENGINES, args.ranks)
        else:
            compare_ways(runs, folder, args.ways, args.engine)
    failed = [name for name, row in runs.found["rows"].items() if "error" in row]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
