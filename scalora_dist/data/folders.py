"""Finds the data files of each split of a folder: by its README.md, or by the files' names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets.data_files import sanitize_patterns
from huggingface_hub import metadata_load

from scalora_dist.data.files import KINDS, TEXT, kind_of
from scalora_dist.errors import UserError

logger = logging.getLogger(__name__)

# The words of https://huggingface.co/docs/datasets/repository_structure.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # data/train_sft-00000-of-00003.parquet
DESCRIPTIONS = ("readme", "license", "licence")
# What a subset of README.md may say without another reading of its files.
KNOWN = {"config_name", "data_dir", "data_files", "default", "description", "version", "features"}
METADATA = ("dataset_info.json", "dataset_infos.json", "config.json")  # as `datasets` ignores
LISTED = 5  # names of files in a message


def find_splits(folder: Path, label: str, config_name: str | None) -> dict[str, list[Path]]:
    """The data files of each split, sorted by their paths. A warning names what is left out.

    If README.md lists subsets, as those of hub data sets do, it decides. Else a word of each file's
    or folder's name decides. If no name has such a word, all files are the split "train".

    Args:
        folder: never a pattern, whatever its name.
        label: the folder's name in messages.
        config_name: name of the subset.

    Raises:
        UserError: no data files, an unusable README.md, or no such subset.
    """
    subsets = _read_subsets(folder, label)
    if subsets:
        splits, left_out = _find_listed(folder, label, _choose(subsets, label, config_name))
        listed = {path for subset in subsets for path in _listed(folder, label, subset)}
        left_out += [
            (path, "README.md lists it in no subset")
            for path in filter(_may_hold_data, _walk(folder))
            if path not in listed and kind_of(path)
        ]
    elif config_name:
        raise UserError(f"{label} has no subset {config_name!r}: its README.md lists none.")
    else:
        splits, left_out = _find_by_name(folder, label)
    if left_out:
        named = [f"{path.relative_to(folder)} ({why})" for path, why in left_out[:LISTED]]
        more = f" and {len(left_out) - LISTED} more" if len(left_out) > LISTED else ""
        logger.warning("%s: left out %s%s.", label, ", ".join(named), more)
    return splits


def match_split(asked: str, splits: Iterable[str], label: str) -> str:
    """The split that `asked` names, itself or by another of its words ("dev" for "validation").

    Raises:
        UserError: there is no such split.
    """
    known = list(splits)
    if asked in known:
        return asked
    for split in known:
        if SPLIT_OF_WORD.get(split, split) == SPLIT_OF_WORD.get(asked, asked):
            return split
    raise UserError(f"{label} has no split {asked!r}; it has: {', '.join(known)}.")


Found = tuple[dict[str, list[Path]], list[tuple[Path, str]]]  # splits, and what is left out and why


def _find_by_name(folder: Path, label: str) -> Found:
    data, left_out = [], []
    for path in filter(_may_hold_data, _walk(folder)):
        if path.is_dir():
            left_out.append((path, "a link to a folder"))
        elif kind_of(path):
            data.append(path)
        else:
            left_out.append((path, "not a data file"))
    texts = [path for path in data if kind_of(path) == TEXT]
    if len(texts) < len(data):
        data = [path for path in data if kind_of(path) != TEXT]
        left_out += [(path, "text beside data files of other kinds") for path in texts]
    splits: dict[str, list[Path]] = {}
    without: list[Path] = []
    for path in data:
        split = _split_of(path.relative_to(folder))
        (splits.setdefault(split, []) if split else without).append(path)
    if not splits:
        splits = {"train": without} if without else {}
    else:
        left_out += [(path, "its name tells no split") for path in without]
    if not splits:
        raise UserError(f"The folder {label} holds no {', '.join(KINDS)} files.")
    for split, paths in splits.items():
        first: dict[Path, Path] = {}  # a link may name a file again
        for path in paths:
            same = first.setdefault(path.resolve(), path)
            if same is not path:
                left_out.append((path, f"the same file as {same.name}"))
        splits[split] = list(first.values())
    return splits, left_out


def _may_hold_data(path: Path) -> bool:
    described = path.name.lower().startswith(DESCRIPTIONS) and kind_of(path) in (None, TEXT)
    return not described and path.name not in METADATA


def _split_of(path: Path) -> str | None:
    """The split that the file's name tells, else the nearest of its folders that tells one.

    The shards in a folder ``data`` have the split before their number, which may be any name.
    """
    if shard := SHARD.match(path.as_posix()):
        return SPLIT_OF_WORD.get(shard[1].lower(), shard[1])
    return next(filter(None, map(_split_in, reversed(path.parts))), None)


def _split_in(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    found = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
    return found.pop() if len(found) == 1 else None  # two, as in train_test.csv, tell nothing


def _walk(folder: Path) -> Iterator[Path]:
    """All files and links but hidden ones, sorted by their paths.

    Links to folders are not followed: they may show files again.

    Raises:
        OSError: a folder cannot be read.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _read_subsets(folder: Path, label: str) -> list[dict[str, Any]]:
    """What the front matter of README.md says under `configs`."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    try:
        subsets = (metadata_load(readme) or {}).get("configs") or []
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"The front matter of {label}/README.md is not valid YAML ({_one_line(error)})."
        ) from error
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"In {label}/README.md, configs must be a list of subsets.")
    return subsets


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name_of(subset: dict[str, Any]) -> str:
    return str(subset.get("config_name", "default"))


def _choose(
    subsets: Sequence[dict[str, Any]], label: str, config_name: str | None
) -> dict[str, Any]:
    names = [_name_of(subset) for subset in subsets]
    listed = f"{label} has the subsets {', '.join(names)}"
    if config_name:
        if config_name not in names:
            raise UserError(f"{listed}, but no {config_name!r}.")
        return subsets[names.index(config_name)]
    defaults = [subset for subset in subsets if subset.get("default") is True]
    defaults += [subset for subset in subsets if _name_of(subset) == "default"]
    if defaults or len(subsets) == 1:
        return [*defaults, *subsets][0]
    raise UserError(f"{listed}: name one with --dataset_config_name.")


def _find_listed(folder: Path, label: str, subset: dict[str, Any]) -> Found:
    data_dir = str(subset.get("data_dir") or "")
    base = folder / data_dir
    where = f"the subset {_name_of(subset)!r} of {label}"
    if unknown := subset.keys() - KNOWN:
        raise UserError(
            f"For {where}, README.md sets {min(unknown)}, which is not read here: name its files "
            "with --dataset."
        )
    if Path(data_dir).is_absolute() or not base.is_dir():
        raise UserError(f"For {where}, README.md names the folder {data_dir}, which is not in it.")
    if not subset.get("data_files"):
        return _find_by_name(base, str(Path(label, data_dir)))
    splits: dict[str, list[Path]] = {}
    left_out: dict[Path, str] = {}
    try:
        patterns = sanitize_patterns(subset["data_files"])
        matches = {
            split: {path for pattern in given for path in _match(base, pattern)}
            for split, given in patterns.items()
        }
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"For {where}, README.md has bad data_files ({_one_line(error)})."
        ) from error
    for split, paths in matches.items():
        matched = set(filter(_may_hold_data, paths))
        splits[split] = sorted(path for path in matched if kind_of(path))
        left_out |= {path: "not a data file" for path in matched if not kind_of(path)}
        if not splits[split]:
            raise UserError(
                f"For {where}, README.md names the files {', '.join(map(str, patterns[split]))}, "
                f"but there is no such {', '.join(KINDS)} file."
            )
    return splits, sorted(left_out.items())


def _listed(folder: Path, label: str, subset: dict[str, Any]) -> set[Path]:
    """All files of a subset; none if it cannot be used."""
    try:
        splits, _ = _find_listed(folder, label, subset)
    except UserError:
        return set()
    return {path for paths in splits.values() for path in paths}


def _match(base: Path, pattern: str) -> Iterator[Path]:
    """The files that a pattern of README.md matches; a file of exactly this name comes first."""
    if (base / pattern).is_file():
        yield base / pattern
        return
    # A last ** means all files; pathlib takes it for all folders.
    pattern = re.sub(r"(^|/)\*\*$", r"\1**/*", pattern)
    for path in base.glob(pattern):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(base).parts)
        if path.is_file() and not hidden:
            yield path
