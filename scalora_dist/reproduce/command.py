"""``scalora reproduce``: computes a figure of the ScaLoRA paper, and what its text says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from scalora_dist.config.option import Group, tool_option
from scalora_dist.config.words import Parser
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.reproduce import figure1, plots
from scalora_dist.training.run_log import write_json

REGRESSION = "Figure 1: the linear regression of section 4.1, by full GD, LoRA and ScaLoRA."
CONDITIONS = """Figures 2(c) and 2(d): the rank of the gradient, and how often the column solution
is positive, during ScaLoRA runs. Further options are those of `scalora train`, such as
--model_name_or_path, --dataset and --max_steps."""


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


@dataclass(frozen=True)
class Figure2Arguments(Group):
    _argument_group_name = "figure2"

    output_dir: str = tool_option(".", "The folder for the PNG, the JSON, the table and the runs.")
    ranks: list[int] = tool_option([1, 2, 4, 8, 16], "r of each run.", at_least=1)
    batch_sizes: list[int] = tool_option([16], "Examples of a step, of each run.", at_least=1)
    gradient_every: int = tool_option(10, "Steps from one gradient of W to the next.", at_least=1)
    gradient_layers: int = tool_option(14, "Layers whose gradient is computed.", at_least=1)


def reproduce_command(words: Sequence[str]) -> None:
    """Compute one figure and write it.

    Raises:
        UserError: a mistake in the options.
    """
    figures = {"figure1": reproduce_figure1, "figure2": reproduce_figure2}
    name, *options = words or ["?"]
    if name not in figures:
        raise UserError(
            "scalora reproduce: say figure1 or figure2 first; scalora reproduce figure1 --help "
            "lists the options"
        )
    figures[name](options)


def reproduce_figure1(words: Sequence[str]) -> None:
    """Compute and write figure 1."""
    (args,) = _parser(Figure1Arguments, REGRESSION).parse_args_into_dataclasses(list(words))
    world = World.join(timeout=timedelta(minutes=1))
    data = figure1.figure1(
        world,
        ranks=args.ranks,
        features=args.features,
        samples=args.samples,
        iterations=args.iterations,
        seed=args.seed,
    )
    folder = Path(args.output_dir)
    table = figure1.table(data)
    write(folder, "figure1", data, table)
    print(table)
    plots.draw_figure1(data, folder / "figure1.png")
    world.leave()


def reproduce_figure2(words: Sequence[str]) -> None:
    """Train the runs of figure 2, and write what was observed."""
    from scalora_dist.engines.build import join
    from scalora_dist.reproduce import figure2
    from scalora_dist.reproduce.conditions import observe

    parser = _parser(Figure2Arguments, CONDITIONS)
    args, rest = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    folder = Path(args.output_dir)
    runs = [
        figure2.options_of(rest, folder, rank, batch)
        for rank in args.ranks
        for batch in args.batch_sizes
    ]
    world = join(runs[0])
    every, count = args.gradient_every, args.gradient_layers
    model = Path(str(runs[0].model.model_name_or_path)).name
    data: dict[str, Any] = {"model": model, "runs": []}
    for options in runs:
        data["runs"].append(observe(options, world, every=every, count=count))
        write(folder, "figure2", data, figure2.table(data))  # now: a later run may fail
    print(figure2.table(data))
    plots.draw_figure2(data, folder / "figure2.png")
    world.leave()


def _parser(group: type[Group], description: str) -> Parser:
    name = f"scalora reproduce {group._argument_group_name}"
    return Parser([group], allow_abbrev=False, prog=name, description=description)


def write(folder: Path, name: str, data: dict[str, Any], table: str) -> None:
    """Write the JSON and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", data)
    (folder / f"{name}.md").write_text(table)
