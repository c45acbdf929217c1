"""The options of a plan: the model, and the cluster for which the run is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from scalora_dist.config.option import JsonFile, tool_option
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.config.words import Parser
from scalora_dist.errors import UserError
from scalora_dist.profiling.gpus import GPUS

SHIPPED = Path(__file__).parent / "models"
DESCRIPTION = """Plan a run on a cluster: memory by part, messages, least times, whether it fits.
The options of the run are those of `scalora train`, also from --config. No weights are loaded and
no GPU is needed: the model is built on the meta device, and one micro-batch is traced on tensors
without storage."""


@dataclass(frozen=True)
class PlanArguments(JsonFile):
    """A plan's own options, for ``HfArgumentParser``. The run's options are the trainer's."""

    _argument_group_name = "plan"

    model: Optional[str] = tool_option(
        None,
        "A hub name, a folder or a config.json; of google/gemma-3-12b-pt, meta-llama/Llama-2-7b-hf,"
        " meta-llama/Meta-Llama-3-8B and -70B, and microsoft/deberta-v3-base the config is here.",
    )
    nodes: int = tool_option(1, "Number of nodes.", at_least=1)
    gpus_per_node: int = tool_option(8, "GPUs of each node.", at_least=1)
    gpu: str = tool_option("h100-80g", f"One of {', '.join(GPUS)}.")
    network: float = tool_option(
        50.0, "10⁹ bytes/s between nodes for each GPU (400 Gb/s are 50).", above=0
    )
    reserve: float = tool_option(
        2.0,
        "GiB of a GPU that a plan leaves alone: CUDA, NCCL, what the allocator cannot use.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu}: choose one of {', '.join(GPUS)}")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def config_folder(model: str, revision: str | None = None) -> str:
    """The folder or hub name from which transformers reads the config of ``model``.

    Args:
        model: a model with a shipped config, a hub name, a folder, or a config.json.
        revision: a revision of the hub; the shipped configs are those of the main branches.

    Raises:
        UserError: a JSON file is given that does not exist or is not called config.json.
    """
    if revision is None and (SHIPPED / model / "config.json").is_file():
        return str(SHIPPED / model)
    path = Path(model)
    if path.suffix == ".json":
        if path.name != "config.json" or not path.is_file():
            raise UserError(f"--model {model}: name a folder that has a config.json, or that file")
        return str(path.parent)
    return model


def parse_plan(words: Sequence[str]) -> tuple[PlanArguments, Options]:
    """Read the words of ``scalora plan``: the plan's own options, and those of the run.

    Raises:
        UserError: a mistake in the options.
    """
    parser = Parser(
        [PlanArguments],
        allow_abbrev=False,
        prog="scalora plan",
        description=DESCRIPTION,
        epilog="The run's options: scalora train --help.",
    )
    where, rest = parser.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
    # A plan writes no results, so any folder will do.
    return where, parse_options([*rest, "--output_dir", "."])
