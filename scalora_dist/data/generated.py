"""Generates examples of verifiable tasks with reasoning_gym, from a seed."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from scalora_dist.errors import UserError

PREFIX = "reasoning_gym:"
FEATURES = Features({"query": Value("string"), "response": Value("string")})


def generate_examples(task: str, *, seed: int, size: int, options: dict[str, Any]) -> Dataset:
    """Return `size` examples with different questions, columns query and response (strings).

    The first process writes them to the `datasets` cache, the others only read it. This is not for
    speed alone: a task that draws from a Python set would differ between processes.

    Raises:
        UserError: `size` below 1, no reasoning_gym installed, an unknown task or option, or a task
            with too few questions.
    """
    if size < 1:
        raise UserError(f"{PREFIX}{task} needs a number of examples of at least 1, got {size}.")
    try:
        version = metadata.version("reasoning_gym")
    except metadata.PackageNotFoundError:
        raise UserError(f"{PREFIX}{task} needs reasoning_gym: pip install reasoning-gym.") from None
    call = {
        "task": task,
        "seed": seed,
        "size": size,
        "options": json.dumps(options, sort_keys=True),
    }
    try:
        return Dataset.from_generator(
            _draw, features=FEATURES, gen_kwargs=call, fingerprint=Hasher.hash([version, call])
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _draw(task: str, seed: int, size: int, options: str) -> Iterator[dict[str, str]]:
    """Yield `size` different questions."""
    seen: set[str] = set()
    while len(seen) < size:
        before = len(seen)
        # Most tasks draw question i from seed + i, so the next round continues where this one ends.
        # One larger draw would not do: in some tasks the kinds of question depend on the size.
        for entry in _create(task, seed, size, json.loads(options)):
            if len(seen) < size and entry["question"] not in seen:
                seen.add(entry["question"])
                yield {"query": entry["question"], "response": entry["answer"]}
        if len(seen) == before:
            raise UserError(
                f"{PREFIX}{task} found only {before} different questions of the {size} asked for "
                "(training and held-out part together): ask for fewer, or widen --dataset_options."
            )
        seed += size


def _create(task: str, seed: int, size: int, options: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Create the task. If its name or an option is unknown, the UserError lists the known ones."""
    # Imported here: it takes seconds, which ranks with a filled cache can save.
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        raise UserError(f"reasoning_gym has no task {task!r}{_names_like(task, DATASETS)}.")
    _, config = DATASETS[task]
    known = [f.name for f in dataclasses.fields(config) if f.name not in ("seed", "size")]
    for option in options:
        if option not in known:
            raise UserError(f"{PREFIX}{task} has no option {option!r}{_names_like(option, known)}.")
    try:
        return create_dataset(task, seed=seed, size=size, **options)
    except (
        Exception
    ) as error:  # each task checks its options in its own way: assert, ValueError, ...
        raise UserError(f"{PREFIX}{task} refuses the options {options}: {error}.") from error


def _names_like(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known)
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    return f"{meant} It has: {', '.join(sorted(known))}"
