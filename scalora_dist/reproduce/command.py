"""``scalora reproduce``: computes a figure of the ScaLoRA paper, and what its text says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from scalora_dist.config.option import Group, tool_option
from scalora_dist.config.parser import Parser
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.reproduce import figure1, plots

DESCRIPTION = """Compute a figure of the ScaLoRA paper: `scalora reproduce figure1 --output_dir DIR`
is the linear regression of section 4.1."""


@dataclass(frozen=True)
class Figure1Arguments(Group):
    _argument_group_name = "figure1"

    output_dir: str = tool_option(".", "The folder for the PNG, the JSON and the table.")
    ranks: list[int] = tool_option([4], "r of LoRA and ScaLoRA.", at_least=1)
    features: int = tool_option(64, "Rows and columns of W.", at_least=2)
    samples: int = tool_option(48, "Columns of X and Y.", at_least=1)
    iterations: int = tool_option(200, "Iterations of gradient descent.", at_least=1)
    seed: int = tool_option(0, "The seed of X and Y.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.ranks) > self.features:
            raise UserError(f"--ranks {max(self.ranks)}: set ranks of at most --features")


def reproduce_command(words: Sequence[str]) -> None:
    """Compute one figure and write it.

    Raises:
        UserError: a mistake in the options, or matplotlib is not installed.
    """
    name, *options = words or ["--help"]
    if name != "figure1":
        raise UserError(f"scalora reproduce {name}: choose figure1, e.g. {DESCRIPTION}")
    plots.check_matplotlib()
    reproduce_figure1(options)


def reproduce_figure1(words: Sequence[str]) -> None:
    parser = Parser(
        [Figure1Arguments],
        allow_abbrev=False,
        prog="scalora reproduce figure1",
        description=DESCRIPTION,
    )
    (args,) = parser.parse_args_into_dataclasses(list(words))
    world = World.join(timeout=timedelta(minutes=1))
    data = figure1.figure1(
        world,
        ranks=args.ranks,
        features=args.features,
        samples=args.samples,
        iterations=args.iterations,
        seed=args.seed,
    )
    folder = write(Path(args.output_dir), "figure1", data, figure1.table(data))
    plots.draw_figure1(data, folder / "figure1.png")
    world.leave()


def write(folder: Path, name: str, data: dict[str, Any], table: str) -> Path:
    """Write the JSON and the table, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data))
    (folder / f"{name}.md").write_text(table)
    print(table)
    return folder
