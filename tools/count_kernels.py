"""Counts what a GPU does in a step of a run: kernels, host synchronisations, bytes, collectives.

    python tools/count_kernels.py --model_name_or_path google/gemma-3-12b-pt --nodes 2 \\
        --engine zero3 [--gpus_per_node 8 --method scalora --rank 8 …] [--json counts.json]

No GPU is needed and no weights are read: the model of a shipped config, of a folder or of the hub
is traced on tensors without storage, and the method's work runs on a fake GPU, on a middle rank.
The other options are those of `scalora train`; without them it is bf16, sequences of `--max_length`
tokens, one a micro-batch. docs/benchmarks.md has a table. The rules of counting are those of
`scalora_dist/profiling/kernels.py`. Kernels of a gather or a reduction around a forward are the
engine's own and are not counted, as are DeepSpeed's around the optimizer's step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from scalora_dist.config.option import JsonFile, tool_option
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import Parser
from scalora_dist.errors import UserError, exit_with_one_sentence
from scalora_dist.modeling.load import read_base_model
from scalora_dist.planning.arguments import config_folder
from scalora_dist.planning.plan import pick_residency
from scalora_dist.planning.traced_model import trace_frozen_model, trace_model
from scalora_dist.profiling.kernels import Counts
from scalora_dist.training.resolve import resolve
from scalora_dist.training.run_log import write_json
from tools.fake_gpu.counts import method_counts, optimizer_counts

ENGINES: dict[str, list[str]] = {
    "local": [],
    "zero1": ["--ds_config", "zero1"],
    "zero3": ["--ds_config", "zero3"],
    "fsdp": ["--fsdp"],
}
DEFAULTS = ["--bf16", "--per_device_train_batch_size", "1", "--output_dir", "."]
MICRO_BATCH = "micro-batch"
ADAPTERS = "of it the adapters'"
OPTIMIZER = "AdamW"
HEAD = ["", "kernels", "waits", "GB read", "GB written", "collectives", "MB of them"]


@dataclass(frozen=True)
class CountArguments(JsonFile):
    _argument_group_name = "count"

    model_name_or_path: Optional[str] = tool_option(
        None, "A model with a shipped config, a hub name, or a folder."
    )
    nodes: int = tool_option(1, "Number of nodes.", at_least=1)
    gpus_per_node: int = tool_option(8, "GPUs of each node.", at_least=1)
    engine: str = tool_option("zero3", f"One of {', '.join(ENGINES)}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is missing: name a model")
        if self.engine not in ENGINES:
            raise UserError(f"--engine {self.engine}: choose one of {', '.join(ENGINES)}")
        if self.engine == "local" and self.nodes > 1:
            raise UserError("--engine local is one GPU: leave out --nodes")

    @property
    def world(self) -> int:
        return 1 if self.engine == "local" else self.nodes * self.gpus_per_node


def counts_of(options: Options, world: int) -> dict[str, Counts]:
    """{part of a step: its counts}, on one rank of ``world``."""
    base = read_base_model(options.model, options.train.dtype, torch.device("meta"))
    options = resolve(options, world, base)
    _, compute = pick_residency(options, base, world)
    traced = trace_model(options, base, compute)
    if not traced.shapes:
        raise UserError(
            f"--method {options.method.name} has no factors A and B of this package: choose another"
        )
    whole, frozen = traced.trace.kernels, trace_frozen_model(options, base, compute).kernels
    parts = {MICRO_BATCH: whole, ADAPTERS: whole - frozen}
    for part, counts in method_counts(options, traced.shapes, world).items():
        parts[f"rescale: {part}"] = counts
    return parts | {OPTIMIZER: optimizer_counts(options, traced.shapes, world)}


def check(options: Options, engine: str) -> None:
    """Refuse what the tool does not count, and another engine than ``engine``.

    Raises:
        UserError: there is such an option, on the command line or in a recipe.
    """
    asked, given = (
        (launch.ds_config, launch.fsdp, launch.fsdp_config)
        for launch in (parse_options([*DEFAULTS, *ENGINES[engine]]).launch, options.launch)
    )
    if given != asked:
        raise UserError("--engine names the engine: leave out --ds_config, --fsdp, --fsdp_config")
    if options.train.torch_compile:
        raise UserError("kernels of compiled blocks cannot be counted: leave out --torch_compile")
    if options.model.load_in_4bit:
        raise UserError("bitsandbytes' kernels cannot be counted: leave out --load_in_4bit")


def table(parts: dict[str, Counts]) -> str:
    """A table in Markdown."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)]]
    for part, counts in parts.items():
        numbers = [
            f"{counts.total:,}",
            str(counts.waits),
            number(counts.read / 1e9),
            number(counts.written / 1e9),
            str(sum(counts.collectives.values())),
            number(counts.collective_bytes / 1e6),
        ]
        lines.append([part, *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(words: Sequence[str]) -> None:
    parser = Parser([CountArguments], allow_abbrev=False, description=__doc__)
    where, rest = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    options = parse_options([*DEFAULTS, *ENGINES[where.engine], *rest])
    check(options, where.engine)
    options = options.having(model_name_or_path=config_folder(str(where.model_name_or_path)))
    parts = counts_of(options, where.world)
    print(f"{where.model_name_or_path}, {where.engine}, {where.world} rank(s)\n\n{table(parts)}")
    if where.json:
        write_json(Path(where.json), {part: vars(counts) for part, counts in parts.items()})


if __name__ == "__main__":
    with exit_with_one_sentence():
        main(sys.argv[1:])
