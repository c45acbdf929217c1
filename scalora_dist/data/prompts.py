"""Reads examples: the columns of a data set decide what is the prompt and what is the target."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from scalora_dist.data.messages import Message, decoded, read_messages, read_tools
from scalora_dist.errors import UserError

Part: TypeAlias = tuple[str, bool]  # a piece of a text, and whether it is a target
IGNORE = -100  # the label that torch's cross entropy skips


class Row(dict[str, Any]):
    """The columns of an example. Remembers which were read, as the others have no effect."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self.was_read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.was_read.add(name)
        return super().get(name, default)

    def ignored(self) -> set[str]:
        """Names of the columns that hold something and were not read."""
        return {name for name in self.keys() - self.was_read if self[name] not in EMPTY}


EMPTY: tuple[Any, ...] = (None, "", [], {})
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Texts:
    """Prompts, each with its completion. The completions are the targets."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chat:
    """Chat messages.

    Attributes:
        messages: each has a role, a content and what else the chat template may read.
        targets: whether each message is one to train on; only the assistant's are.
        excludes: whether an assistant message says that it is none.
        tools: definitions of tools for the chat template, or None.
        template_options: other variables for the chat template.
        ignored: names of keys that have no effect here.
    """

    messages: list[Message]
    targets: list[bool]
    excludes: bool = False
    tools: list[Any] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels (-100: not a target), of equal length."""

    ids: list[int]
    labels: list[int]


Example: TypeAlias = Texts | Chat | Tokens


@dataclass(frozen=True)
class Shape:
    """One layout of examples, which is chosen where all of its columns are there."""

    columns: tuple[str, ...]
    read: Callable[[Row], Example]  # raises a UserError for a null or wrong-typed field


def recognise(columns: Iterable[str]) -> Shape:
    """Return the first shape whose columns are all present.

    Raises:
        UserError: no shape fits. The message names the columns and the known shapes.
    """
    columns = list(columns)
    for shape in SHAPES:
        if set(shape.columns) <= set(columns):
            return shape
    known = "; ".join(" + ".join(shape.columns) for shape in SHAPES)
    raise UserError(
        f"the columns {', '.join(columns) or '(none)'} are no known layout of examples: write the "
        "text with --prompt_template and --completion_template, or rename the columns to one of: "
        f"{known}"
    )


def from_templates(prompt: str, completion: str) -> Shape:
    """The shape of examples whose texts are made by two templates, such as ``Q: {question}``.

    Raises:
        UserError: a brace in a template belongs to no column.
    """
    templates = [_unescaped(prompt), _unescaped(completion)]
    columns = [name for template in templates for name in _fields(template)]
    if not _fields(templates[1]):
        raise UserError(f"--completion_template {completion!r} names no {{column}}")

    def read(row: Row) -> Texts:
        return Texts((tuple(_filled(template, row) for template in templates),))  # type: ignore[arg-type]

    return Shape(tuple(dict.fromkeys(columns)), read)


FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def _unescaped(template: str) -> str:
    """A shell passes a line break on as a backslash and an n."""
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m[1]], template)


def _fields(template: str) -> list[str]:
    for brace in FIELD.finditer(template):
        if brace[0] in ("{", "}"):
            raise UserError(
                f"--prompt_template or --completion_template {template!r} has a lone {brace[0]}: "
                f"write {brace[0] * 2} for a brace, and {{column}} for a column"
            )
    return [brace[1] for brace in FIELD.finditer(template) if brace[1]]


def _filled(template: str, row: Row) -> str:
    return FIELD.sub(lambda brace: _as_text(row, brace[1]) if brace[1] else brace[0][0], template)


def _as_text(row: Row, name: str) -> str:
    """A column's text. A number is written as JSON writes it."""
    value = row.get(name)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"the field {name!r} is {value}, which is no number")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return _text(row, name, "a string or a number")


def _text(row: Row, name: str, wanted: str = "a string") -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if name not in row:
        raise UserError(f"the field {name!r} is missing; there are: {', '.join(row)}")
    found = "null" if value is None else f"of type {type(value).__name__}"
    raise UserError(f"the field {name!r} is {found}, it must be {wanted}")


def _optional_text(row: Row, name: str) -> str:
    return "" if row.get(name) is None else _text(row, name)


def _chat(row: Row, *columns: str) -> Chat:
    """The messages in `columns`, one after the other. Those of the last one are the targets."""
    parts = [read_messages(row.get(name), name) for name in columns]
    messages = [message for part in parts for message in part.messages]
    targets = [part is parts[-1] and hit for part in parts for hit in part.targets]
    ignored = frozenset().union(*(part.ignored for part in parts))
    if system := _optional_text(row, "system"):
        if messages[0]["role"] == "system":
            ignored |= {"system"}
        else:
            messages, targets = (
                [{"role": "system", "content": system}, *messages],
                [False, *targets],
            )
    options = decoded(row.get("chat_template_kwargs")) or {}
    if not isinstance(options, dict):
        raise UserError("the field 'chat_template_kwargs' must be an object")
    tools = read_tools(row.get("tools"))
    excludes = any(part.excludes for part in parts)
    return Chat(messages, targets, excludes, tools, options, ignored)


def _read_prompt_completion(row: Row) -> Texts | Chat:
    if isinstance(row.get("prompt"), list):  # the format of TRL
        return _chat(row, "prompt", "completion")
    return Texts(((_text(row, "prompt"), _text(row, "completion")),))


def _read_alpaca(row: Row) -> Texts:
    """Alpaca's prompt. LLaMA-Factory's `system` takes the place of its first sentences, and the
    questions and answers of `history` stand before the instruction."""
    instruction, given = _text(row, "instruction"), _optional_text(row, "input")
    system = _optional_text(row, "system") or (ALPACA_WITH_INPUT if given else ALPACA)
    pairs, before = [], system + "\n\n"
    history = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise UserError("the field 'history' must be a list of pairs of strings")
    for turn in history:
        pairs.append((f"{before}### Instruction:\n{turn[0]}\n\n### Response:\n", turn[1]))
        before = "\n\n"
    body = f"{instruction}\n\n### Input:\n{given}" if given else instruction
    pairs.append((f"{before}### Instruction:\n{body}\n\n### Response:\n", _text(row, "output")))
    return Texts(tuple(pairs))


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and [type(text) for text in turn] == [str, str]


def _read_lines(row: Row, prompt: str, completion: str) -> Texts:
    return Texts(((_text(row, prompt) + "\n", _text(row, completion)),))


def _read_tokens(row: Row) -> Tokens:
    ids = _numbers(row, "input_ids")
    labels = list(ids) if row.get("labels") is None else _numbers(row, "labels")
    mask = row.get("attention_mask")
    mask = [1] * len(ids) if mask is None else mask
    if not isinstance(mask, list) or any(seen not in (0, 1) for seen in mask):
        raise UserError("the field 'attention_mask' must be a list of 0 and 1")
    for name, other in (("labels", labels), ("attention_mask", mask)):
        if len(other) != len(ids):
            raise UserError(f"it has {len(ids)} input_ids, but {len(other)} {name}")
    if _match(labels, ids[1:]) and not _match(labels, ids):
        raise UserError("its labels are shifted by one token: leave that to the loss")
    kept = [k for k, seen in enumerate(mask) if seen]  # the rest is padding
    if kept != list(range(kept[0], kept[-1] + 1) if kept else []):
        raise UserError("its attention_mask has a 0 between tokens: only padding may have one")
    return Tokens([ids[k] for k in kept], [labels[k] for k in kept])


def _match(labels: list[int], ids: list[int]) -> bool:
    """Whether each label that is a target is the id at its place."""
    return all(label in (i, IGNORE) for label, i in zip(labels, ids, strict=False))


def _numbers(row: Row, name: str) -> list[int]:
    value = row.get(name)
    lowest = IGNORE if name == "labels" else 0
    if not isinstance(value, list) or any(
        type(n) is not int or not lowest <= n < 2**31 for n in value
    ):
        raise UserError(f"the field {name!r} must be a list of token ids")
    return value


# In the order of trial: a data set may have, say, a rendered `text` beside its `messages`.
SHAPES = (
    Shape(("input_ids",), _read_tokens),
    Shape(("messages",), lambda row: _chat(row, "messages")),
    Shape(("conversations",), lambda row: _chat(row, "conversations")),
    Shape(("prompt", "completion"), _read_prompt_completion),
    Shape(("instruction", "output"), _read_alpaca),
    Shape(("query", "response"), lambda row: _read_lines(row, "query", "response")),
    Shape(("question", "answer"), lambda row: _read_lines(row, "question", "answer")),
    Shape(("text",), lambda row: Texts((("", _text(row, "text")),))),
)
