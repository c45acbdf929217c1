"""Options of the training and evaluation data.

A resume compares the data by content (``check_same_data``), so data files may have moved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, Optional, TypeAlias

from scalora_dist.config.option import Group, option
from scalora_dist.errors import UserError

ChatTurns: TypeAlias = Literal["all", "last", "each"]


@dataclass(frozen=True)
class DataArguments(Group):
    """`prepare_data` checks the values against the data."""

    _argument_group_name = "data"

    dataset: str | None = option(
        None,
        "Training data: a JSON, JSONL, CSV, TSV, text or Parquet file, a folder of such files or "
        "one written by datasets.save_to_disk, reasoning_gym:<task>, or a name on the hub.",
        resume="warned",
    )
    dataset_config_name: str | None = option(
        None,
        "Subset of `dataset`: of a hub data set, or of a folder whose README.md lists `configs`.",
        resume="warned",
    )
    dataset_split: str = option(
        "train",
        "Split of `dataset` to train on; slices such as train[:1000] work.",
        resume="warned",
    )
    dataset_size: int = option(
        1000, "Training examples to generate (reasoning_gym only).", resume="warned", at_least=1
    )
    dataset_options: str = option(
        "{}",
        "Options of the reasoning_gym task, a JSON object such as '{\"max_terms\": 3}'.",
        resume="warned",
    )
    eval_dataset: str | None = option(
        None,
        "Evaluation data, named like `dataset`; without it, --eval_size holds out examples.",
        resume="warned",
    )
    eval_dataset_config_name: str | None = option(
        None,
        "Subset of `eval_dataset`; by default that of `dataset` where both are the same data set.",
        resume="warned",
    )
    eval_dataset_split: str = option(
        "test", "Split of `eval_dataset` to evaluate on.", resume="warned"
    )
    eval_size: int = option(
        0,
        "Rows to hold out of a shuffled `dataset`, or to take of `eval_dataset` (0: hold out none, "
        "or take all); a chat is a row, also if it makes several examples.",
        resume="warned",
        at_least=0,
    )
    column_names: list[str] = option(
        [],
        "Names of the columns of CSV and TSV files that have no header line, in their order.",
        resume="warned",
    )
    prompt_template: str | None = option(
        None,
        "Text of the prompt, with {column} for a column's text, {{ and }} for braces, and \\n for "
        "a line break; goes with `completion_template`.",
        resume="warned",
    )
    completion_template: str | None = option(
        None, "Text of the completion, written like `prompt_template`.", resume="warned"
    )
    chat_turns: Optional[ChatTurns] = option(
        None,
        "Turns of a chat to train on; all: every assistant turn, in one example; last: the last "
        "one; each: every one, each in an example of its own; by default all where the chat "
        "template allows it, else each.",
        resume="warned",
    )
    chat_template_kwargs: str = option(
        "{}",
        "Variables for the chat template, a JSON object such as '{\"enable_thinking\": false}'; a "
        "column of this name does the same for its row.",
        resume="warned",
    )
    show_examples: int = option(
        0,
        "Training examples to print before training, with their targets marked; with `dry_run` "
        "no model is loaded.",
        resume="free",
        at_least=0,
    )
    max_length: int = option(
        1024,
        "Tokens per example; longer ones are cut at the right, and dropped if no target is left.",
        resume="warned",
        at_least=2,  # one of them is a target
    )
    train_on_prompt: bool = option(
        False,
        "Make the prompt's tokens targets of the loss too; refused where the data says what is a "
        "target.",
        resume="warned",
    )

    def object_of(self, name: str) -> dict[str, Any]:
        """The value of an option that is a JSON object.

        Raises:
            UserError: it is none.
        """
        text = getattr(self, name)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} is not JSON ({error}): {text!r}.") from None
        if not isinstance(value, dict):
            raise UserError(f"{name} must be a JSON object such as {{}}, got {text!r}.")
        return value
