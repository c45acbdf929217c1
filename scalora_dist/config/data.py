"""Options of the training and evaluation data.

A resume compares the data by content (``check_same_data``), so data files may have moved.
"""

from __future__ import annotations

from dataclasses import dataclass

from scalora_dist.config.option import Group, option


@dataclass(frozen=True)
class DataArguments(Group):
    """`prepare_data` checks the values against the data."""

    _argument_group_name = "data"

    dataset: str | None = option(
        None,
        "Training data: a JSON, JSONL, CSV or Parquet file, a folder of such files or one written "
        "by datasets.save_to_disk, reasoning_gym:<task>, or a name on the hub.",
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
    eval_dataset_split: str = option(
        "test", "Split of `eval_dataset` to evaluate on.", resume="warned"
    )
    eval_size: int = option(
        0,
        "Examples to hold out of a shuffled `dataset`, or to take of `eval_dataset` "
        "(0: hold out none, or take all).",
        resume="warned",
        at_least=0,
    )
    max_length: int = option(
        1024,
        "Tokens per example; longer ones are cut at the right.",
        resume="warned",
        at_least=2,  # one of them is a target
    )
    train_on_prompt: bool = option(
        False, "Make the prompt's tokens targets of the loss too.", resume="warned"
    )
