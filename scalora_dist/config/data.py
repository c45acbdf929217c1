"""Options of the training and evaluation data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataArguments:
    """Fields for `transformers.HfArgumentParser`; `prepare_data` checks their values."""

    _argument_group_name = "data"

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a JSON, JSONL, CSV or Parquet file, a folder of such files "
            "or one written by datasets.save_to_disk, reasoning_gym:<task>, or a name on the hub."
        },
    )
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split of `dataset` to train on; slices such as train[:1000] work."},
    )
    dataset_size: int = field(
        default=1000, metadata={"help": "Training examples to generate (reasoning_gym only)."}
    )
    dataset_options: str = field(
        default="{}",
        metadata={
            "help": "Options of the reasoning_gym task, a JSON object such as '{\"max_terms\": 3}'."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation data, named like `dataset`; without it, --eval_size holds out."
        },
    )
    eval_dataset_split: str = field(
        default="test", metadata={"help": "Split of `eval_dataset` to evaluate on."}
    )
    eval_size: int = field(
        default=0,
        metadata={
            "help": "Examples to hold out of a shuffled `dataset`, or to take of `eval_dataset` "
            "(0: hold out none, or take all)."
        },
    )
    max_length: int = field(
        default=1024, metadata={"help": "Tokens per example; longer ones are cut at the right."}
    )
    train_on_prompt: bool = field(
        default=False, metadata={"help": "Take the loss on the prompt's tokens too."}
    )
