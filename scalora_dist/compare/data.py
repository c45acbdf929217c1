"""Cuts the data of a set-up once, so that all its runs train and are evaluated on the same."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from scalora_dist.compare.runs import Run
from scalora_dist.compare.study import Setup, Study
from scalora_dist.config.data import DataArguments
from scalora_dist.data.examples import Examples
from scalora_dist.data.prepare import check_data
from scalora_dist.data.sources import load_examples
from scalora_dist.errors import UserError

SEED = 0  # of the shuffle before the cut, and of generated tasks
CUT = "cut.json"
CONTENT = "_content"  # a column of the uncut data
logger = logging.getLogger(__name__)


def cut_data(study: Study, setup: Setup, folder: Path) -> None:
    """Write ``train``, ``validation`` and ``test`` (`Dataset.save_to_disk`) of a set-up.

    They are cut from its shuffled training data; ``test`` from its test data, if it names some. No
    two of them share an example: one that is in ``test`` is left out of the others, and one that is
    in ``validation`` is left out of ``train``. Nothing is done if an earlier start of the study has
    cut the same.

    Args:
        folder: becomes the folder of the three, whole or not at all.

    Raises:
        UserError: the data cannot be read, is too small, or something else is in ``folder``.
    """
    wanted = {
        "source": _set(asdict(setup.source)),
        "test_dataset": setup.test_dataset,
        "test_dataset_split": setup.test_dataset_split,
        "validation_size": study.validation_size,
        "test_size": study.test_size,
    }
    if (folder / CUT).exists():
        cut = json.loads((folder / CUT).read_text())
        if cut | {"source": _set(cut["source"])} != wanted:
            raise UserError(
                f"{folder} holds data that was cut otherwise: name another --output_dir"
            )
        return
    if folder.exists():
        raise UserError(f"{folder} holds other things than cut data: name another --output_dir")
    try:
        parts = _cut(study, setup)
    except UserError as error:
        raise UserError(f"set-up {setup.name}: {error}") from error
    partial = folder.with_name(f".{folder.name}.partial")  # no set-up's name begins with a dot
    shutil.rmtree(partial, ignore_errors=True)
    for name, part in parts.items():
        part.save_to_disk(str(partial / name))
    (partial / CUT).write_text(json.dumps(wanted, indent=2) + "\n")
    partial.rename(folder)


def data_options(run: Run, folder: Path) -> dict[str, Any]:
    """The options that name a run's data: tuning runs never see test.

    Args:
        folder: the folder of all set-ups' data.
    """
    own = folder / run.cell.setup
    held_out = {"tune": "validation", "final": "test"}[run.part]
    return {"dataset": str(own / "train"), "eval_dataset": str(own / held_out)}


def _set(source: dict[str, Any]) -> dict[str, Any]:
    """The options that are set. Folders that older versions cut do not know the others."""
    default = asdict(DataArguments())
    return {name: value for name, value in source.items() if value != default.get(name)}


def _cut(study: Study, setup: Setup) -> dict[str, Dataset]:
    source = setup.source
    name, task_options = check_data(source)
    sizes = {"validation": study.validation_size}
    if setup.test_dataset is None:
        sizes["test"] = study.test_size
    generated = source.dataset_size + sum(sizes.values())
    examples = _shuffled(source, name, source.dataset_split, generated, task_options, seed=SEED)
    found = len(examples)
    if setup.test_dataset is None:
        test, examples = examples.take(study.test_size), examples.skip(study.test_size)
    else:
        # A generated task draws its questions from `seed` on: these come after the others.
        after, split = SEED + generated, setup.test_dataset_split
        own = task_options if setup.test_dataset == name else {}
        test = _shuffled(source, setup.test_dataset, split, study.test_size, own, seed=after)
        if len(test) < study.test_size:
            raise UserError(
                f"{setup.test_dataset} has {len(test)} examples: set test_size to at most that"
            )
        test = test.take(study.test_size)
    apart = _without(examples, test)
    validation = apart.take(study.validation_size)
    train = _without(apart.skip(study.validation_size), validation)
    left_out = len(examples) - len(validation) - len(train)
    if not len(train):
        raise UserError(
            f"{name} has {found} examples, too few to cut off "
            f"{' and '.join(f'{size} for {part}' for part, size in sizes.items())}"
            + (f": {left_out} repeat a held-out one" if left_out else "")
        )
    if left_out:
        logger.warning(
            "set-up %s: %d of %d examples repeat a held-out one: left out",
            setup.name,
            left_out,
            found,
        )
    parts = {"train": train, "validation": validation, "test": test}
    return {name: part.remove_columns(CONTENT) for name, part in parts.items()}


def _without(examples: Dataset, held_out: Dataset) -> Dataset:
    """``examples`` but for those that a model reads as one of ``held_out``."""
    known = set(held_out[CONTENT][:])
    return examples.select([k for k, each in enumerate(examples[CONTENT][:]) if each not in known])


def _shuffled(
    source: DataArguments,
    name: str,
    split: str,
    size: int,
    task_options: dict[str, Any],
    *,
    seed: int,
) -> Dataset:
    """The shuffled examples, each with a hash of its prompt and target in the column `CONTENT`.

    Raises:
        UserError: an example is malformed. It is named by its place before the shuffle.
    """
    examples = load_examples(
        name,
        split=split,
        config_name=source.dataset_config_name if name == source.dataset else None,
        column_names=source.column_names,
        seed=seed,
        size=size,
        task_options=task_options,
    )
    reader = Examples(examples, name, source)
    contents = [hash(repr(reader.read(row, k)[1])) for k, row in enumerate(examples)]
    return examples.add_column(CONTENT, contents).shuffle(seed=SEED)
