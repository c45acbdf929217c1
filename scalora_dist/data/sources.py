"""Loads the data set of a given name as a `datasets.Dataset`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from scalora_dist.data.files import kind_of, read_files, reason
from scalora_dist.data.folders import find_splits, match_split
from scalora_dist.data.generated import PREFIX, generate_examples
from scalora_dist.data.own_code import own_code
from scalora_dist.data.rows import FROM_FILE
from scalora_dist.errors import UserError

logger = logging.getLogger(__name__)


def load_examples(
    name: str,
    *,
    split: str,
    seed: int,
    size: int,
    task_options: dict[str, Any],
    config_name: str | None = None,
    column_names: Sequence[str] = (),
) -> Dataset:
    """Load the data set `name`: a file, a folder, ``reasoning_gym:<task>`` or a hub name.

    Examples of files have the columns `rows.FROM_FILE`, others have typed columns. `rows.read_row`
    reads both.

    Args:
        name: a path is taken literally, never as a pattern.
        split: a split or an expression such as "train[:1000]" or "train+validation". A single file
            is used for any split, whatever its name.
        seed: for reasoning_gym.
        size: number of examples, for reasoning_gym.
        task_options: for reasoning_gym.
        config_name: the subset of a hub data set or of a folder with a README.md.
        column_names: names of the columns of CSV and TSV files without a header line.

    Raises:
        UserError: the data is missing, malformed, unreachable or empty.
    """
    path = Path(name).expanduser()
    if name.startswith(PREFIX):
        _refuse_subset(name, config_name)
        return generate_examples(
            name.removeprefix(PREFIX), seed=seed, size=size, options=task_options
        )
    if path.is_file():
        _refuse_subset(name, config_name)
        if path.stat().st_size == 0:
            raise UserError(f"The data file {name} is empty.")
        dataset = _only_one(split, name, lambda: _load_files([(path, name)], column_names, name))
    elif path.is_dir() and _is_saved(path):
        _refuse_subset(name, config_name)
        dataset = _load_saved(path, name, split)
    elif path.is_dir():
        dataset = _load_folder(path, name, split, config_name, column_names)
    elif re.search(r"[*?[\]]", name):
        raise UserError(
            f"The data file or folder {name} does not exist: a path is taken literally, so name "
            "the folder."
        )
    elif kind_of(path) or path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"The data file or folder {name} does not exist.")
    else:
        dataset = _load_hub(name, config_name, split)
    if len(dataset) == 0:
        raise UserError(f"The data set {name} has no examples in {split!r}.")
    return dataset


def _refuse_subset(name: str, config_name: str | None) -> None:
    if config_name:
        raise UserError(f"{name} has no subsets: leave --dataset_config_name out.")


def _load_files(
    paths: Sequence[tuple[Path, str]], column_names: Sequence[str], what: str
) -> Dataset:
    """Read files through the `datasets` cache.

    Args:
        paths: path of each file, and its name in messages.
        what: the name of all of them in messages.
    """
    # Own fingerprint: `datasets` knows nothing of the files' content, or of this code's.
    call = {
        "files": tuple((str(path.absolute()), label) for path, label in paths),
        "column_names": tuple(column_names),
    }
    with _one_sentence(what):
        stats = [path.stat() for path, _ in paths]
        # A file can be written again with its old size and time of modification.
        stamps = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for stat in stats]
        dataset = Dataset.from_generator(
            read_files,
            features=FROM_FILE,
            gen_kwargs=call,
            fingerprint=Hasher.hash([call, stamps, own_code()]),
        )
    for note in filter(None, dataset.unique("note")):  # said each time, also of cached rows
        logger.warning("%s.", note)
    return dataset


def _load_folder(
    path: Path, name: str, split: str, config_name: str | None, column_names: Sequence[str]
) -> Dataset:
    with _one_sentence(name):
        splits = find_splits(path, name, config_name)

    def load(asked: str) -> Dataset:
        found = splits[match_split(asked, splits, name)]
        labelled = [(file, str(Path(name, file.relative_to(path)))) for file in found]
        return _load_files(labelled, column_names, name)

    return _select(split, load, name)


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    names = {"dataset_dict.json", "state.json", "dataset_info.json"}
    found = {file for file in names if (path / file).is_file()}
    return "dataset_dict.json" in found or len(found) == 2


def _load_saved(path: Path, name: str, split: str) -> Dataset:
    with _one_sentence(name):
        saved = load_from_disk(str(path)).with_format(None)  # a saved set can have one
    if isinstance(saved, DatasetDict):
        return _select(split, lambda asked: saved[match_split(asked, saved, name)], name)
    return _only_one(split, name, lambda: saved)


def _only_one(split: str, name: str, load: Callable[[], Dataset]) -> Dataset:
    """The part `split` of a data set that has no splits: it is used for any one."""
    if len(_split_names(split)) > 1:
        raise UserError(f"{name} is a single data set, it cannot be all splits of {split!r}.")
    return _select(split, lambda _: load(), name)


def _split_names(split: str) -> list[str]:
    """The different splits of an expression."""
    return list(dict.fromkeys(re.split(r"[\[(]", part)[0].strip() for part in split.split("+")))


def _select(split: str, load: Callable[[str], Dataset], name: str) -> Dataset:
    """Evaluate a split expression.

    Args:
        load: returns all examples of one split.
    """
    try:
        instruction = ReadInstruction.from_spec(split)
    except (ValueError, AssertionError):
        raise UserError(
            f"The split {split!r} of {name} is malformed: write it like train, train[:1000], "
            "train[10%:20%] or train+validation."
        ) from None
    loaded = {split_name: load(split_name) for split_name in _split_names(split)}
    sizes = {key: len(value) for key, value in loaded.items()}
    has = ", ".join(f"{key} has {size} row(s)" for key, size in sizes.items())
    try:
        ranges = instruction.to_absolute(sizes)
        parts = [
            loaded[part.splitname]
            if part.to - part.from_ == sizes[part.splitname]
            else loaded[part.splitname].select(range(part.from_, part.to))
            for part in ranges
        ]
    except (ValueError, IndexError, AssertionError) as error:
        raise UserError(f"{name} has no {split!r}: {has}.") from error
    if any(sizes.values()) and not any(map(len, parts)):
        raise UserError(f"{name} has no examples in {split!r}: {has}.")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _load_hub(name: str, config_name: str | None, split: str) -> Dataset:
    if name in _PACKAGED_DATASETS_MODULES:
        # `datasets` would read whatever files of this kind are in the current folder.
        raise UserError(f"--dataset {name} names a format: name a file, a folder or a data set.")
    try:
        with _one_sentence(f"The data set {name}"):
            return load_dataset(name, config_name, split=split)
    except UserError as error:
        # "Config name is missing. Please pick one among the available configs: ['main', …]"
        # "BuilderConfig 'x' not found. Available: ['main', …]"
        subsets = re.search(r"(?:available configs|Available): \[(.*?)\]", str(error.__cause__))
        if subsets:
            raise UserError(
                f"The data set {name} has the subsets {subsets[1].replace(chr(39), '')}: name one "
                "with --dataset_config_name."
            ) from error
        raise UserError(f"{error} (There is no file or folder of this name here.)") from error


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn any error of the libraries about the user's data into one UserError.

    It catches every exception: `datasets` passes on errors of many types from pyarrow, fsspec and
    the hub. A UserError that caused one comes out as it was raised. `datasets`' own log lines are
    muted.
    """
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from cause.__cause__
            cause = cause.__cause__
        if "corresponds to no data" in str(error):
            raise UserError(f"{what} has no examples.") from error
        raise UserError(f"{what} cannot be read: {reason(error)}.") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
