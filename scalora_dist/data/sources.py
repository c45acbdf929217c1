"""Loads the data set of a given name as a `datasets.Dataset` of raw columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from scalora_dist.data.generated import PREFIX, generate_examples
from scalora_dist.data.malformed import find_malformed
from scalora_dist.errors import UserError

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_examples(
    name: str, *, split: str, seed: int, size: int, task_options: dict[str, Any]
) -> Dataset:
    """Load the data set `name`: a file, a folder, ``reasoning_gym:<task>`` or a hub name.

    `seed`, `size` and `task_options` are for reasoning_gym alone. A single file is used for any
    `split`, whatever its name.

    Raises:
        UserError: the data is missing, malformed, unreachable or empty.
    """
    if name.startswith(PREFIX):
        return generate_examples(
            name.removeprefix(PREFIX), seed=seed, size=size, options=task_options
        )
    path = Path(name).expanduser()
    if path.is_file():
        dataset = _load_file(path, split)
    elif path.is_dir():
        dataset = _load_folder(path, split)
    elif path.suffix.lower() in FORMATS or path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"The data file or folder {name} does not exist.")
    else:
        dataset = _load_hub(name, split)
    if len(dataset) == 0:
        raise UserError(f"The data set {name} has no examples.")
    return dataset


def _load_file(path: Path, split: str) -> Dataset:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is of no known kind: its name must end in {', '.join(FORMATS)}.")
    if path.stat().st_size == 0:
        raise UserError(f"The data file {path} is empty.")
    base = split.split("[")[0]
    with _one_sentence(f"The data file {path}", [path]):
        return load_dataset(kind, data_files={base: str(path)}, split=split)


def _load_folder(path: Path, split: str) -> Dataset:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FORMATS)
    if not saved and not files:
        raise UserError(f"The folder {path} holds no {', '.join(FORMATS)} files.")
    with _one_sentence(f"The data folder {path}", [] if saved else files):
        if not saved:
            return load_dataset(str(path), split=split)
        dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(f"{path} has no split {split!r}; it has: {', '.join(dataset)}.")
        return dataset[split]
    if "[" in split:
        raise UserError(f"{path} was saved as one data set, so the slice {split!r} is not known.")
    return dataset


def _load_hub(name: str, split: str) -> Dataset:
    try:
        with _one_sentence(f"The data set {name}", []):
            return load_dataset(name, split=split)
    except UserError as error:
        raise UserError(f"{error} (There is no file or folder of this name here.)") from error


@contextmanager
def _one_sentence(what: str, files: list[Path]) -> Iterator[None]:
    """Turn any error of the libraries about the user's data into one UserError.

    It catches every exception: `datasets` passes on errors of many types from pyarrow, pandas,
    fsspec and the hub (an all-blank file is a StopIteration). Its own log lines are muted.
    """
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except Exception as error:
        for file in files:
            if broken := find_malformed(file):
                raise UserError(f"{broken}.") from error
        if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
            raise UserError(f"{what} has no examples.") from error
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = str(root).strip().split("\n")[0] or type(root).__name__
        raise UserError(f"{what} cannot be read: {reason.rstrip('.')}.") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
