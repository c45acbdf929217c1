"""Reads examples: the columns of a data set decide what is the prompt and what is the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scalora_dist.errors import UserError

Row = dict[str, Any]
Message = dict[str, Any]

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Pair:
    """A prompt and a completion. The completion is the target."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Chat messages. The assistant's messages from index `first_target` on are the target."""

    messages: list[Message]
    first_target: int = 0


@dataclass(frozen=True)
class Shape:
    """One layout of examples. `read` raises a UserError for a null or wrong-typed field."""

    columns: tuple[str, ...]
    read: Callable[[Row], Pair | Chat]


def recognise(columns: list[str]) -> Shape:
    """Return the first shape whose columns are all present.

    Raises:
        UserError: no shape fits. The message names the columns and the known shapes.
    """
    for shape in SHAPES:
        if set(shape.columns) <= set(columns):
            return shape
    known = "; ".join(" + ".join(shape.columns) for shape in SHAPES)
    raise UserError(
        f"The columns {', '.join(columns)} are no known layout of examples; known are: {known}."
    )


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        found = "null" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"the field {name!r} is {found}, it must be a string")
    return value


def _messages(row: Row, name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise UserError(f"the field {name!r} must be a list of at least one chat message")
    for message in value:
        keys = ("role", "content")
        if not isinstance(message, dict) or any(not isinstance(message.get(k), str) for k in keys):
            raise UserError(
                f"each message of {name!r} must have a role and a content, both strings"
            )
    return value


def _read_messages(row: Row) -> Chat:
    return Chat(_messages(row, "messages"))


def _read_prompt_completion(row: Row) -> Pair | Chat:
    if isinstance(row["prompt"], list):  # the format of TRL
        prompt = _messages(row, "prompt")
        return Chat(prompt + _messages(row, "completion"), first_target=len(prompt))
    return Pair(_text(row, "prompt"), _text(row, "completion"))


def _read_alpaca(row: Row) -> Pair:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    if row.get("input") in (None, ""):  # empty in the original data, missing in others
        return Pair(ALPACA.format(instruction=instruction), output)
    return Pair(
        ALPACA_WITH_INPUT.format(instruction=instruction, input=_text(row, "input")), output
    )


def _read_query_response(row: Row) -> Pair:
    return Pair(_text(row, "query") + "\n", _text(row, "response"))


def _read_text(row: Row) -> Pair:
    return Pair("", _text(row, "text"))


# In the order of trial: a data set may have, say, a rendered `text` beside its `messages`.
SHAPES = (
    Shape(("messages",), _read_messages),
    Shape(("prompt", "completion"), _read_prompt_completion),
    Shape(("instruction", "output"), _read_alpaca),
    Shape(("query", "response"), _read_query_response),
    Shape(("text",), _read_text),
)
