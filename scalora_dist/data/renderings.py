"""Renders the messages of a chat with a template, and finds in the text what a turn says."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from scalora_dist.data.messages import (
    Message,
    with_arguments,
    with_encoded_arguments,
    with_text_parts,
)
from scalora_dist.data.prompts import Chat, Part
from scalora_dist.errors import UserError

Form: TypeAlias = Callable[[list[Message]], list[Message]]
Span: TypeAlias = tuple[int, int]  # begin and end in a text
MARK = "WORDS\ue000"  # stands for a message's content, to find it in a rendering
OPENED, CLOSED = "<think>", "</think>"  # around a thought
END = 30  # characters of a content that are looked for in a rendering
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers sets all of them
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAG = re.compile(r"<[^<>]+>\s*$")


@dataclass(frozen=True)
class Rendered:
    """The text of some messages, and the spans that {% generation %} marks."""

    text: str
    marks: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Turn:
    """An assistant turn that ends a rendering of the messages up to it, as at inference.

    Attributes:
        parts: the pieces of the text, with the turn as target.
        text: the rendering; None where the turn's generation prompt is no prefix of it.
        spans: the targets in ``text``.
    """

    parts: list[Part]
    text: str | None = None
    spans: tuple[Span, ...] = ()


class Renderings:
    """The renderings of the first messages of one chat.

    Attributes:
        messages: the chat's messages.
        whole: the rendering of all messages.
        ignored: names of what the chat holds and the template does not write, as far as known.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: Chat, options: dict[str, Any]
    ) -> None:
        """Render the whole chat.

        Args:
            tokenizer: has the template.
            chat: the chat.
            options: variables for the template.

        Raises:
            UserError: there is no template, or it fails.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "it is a chat, but the tokenizer has no chat template: use an instruct model, or "
                "data of another layout"
            )
        try:
            self._source = tokenizer.get_chat_template(None, tools=chat.tools)
        except ValueError as error:  # several templates, and none is the default
            raise UserError(f"the tokenizer has no chat template for it ({error})") from None
        kind: Any = type(tokenizer)
        if taken := options.keys() & _reserved(kind):
            raise UserError(f"chat_template_kwargs cannot set {min(taken)!r}")
        self._tokenizer, self._tools, self._options = tokenizer, chat.tools, options
        self._marked = _has_marks(self._source)
        self._known: dict[tuple[int, bool], Rendered] = {}
        self.messages = chat.messages
        self.whole = self._choose_form()
        self.ignored = self._unread()

    def turn(self, index: int) -> Turn:
        """The assistant turn at ``index``.

        Raises:
            UserError: the template fails, or leaves out what the turn says.
        """
        turn = self._marked_turn(index) if self._marked else self._plain_turn(index)
        said = "".join(text for text, hit in turn.parts if hit)
        message = self.messages[index]
        calls = message.get("tool_calls", ())
        for call in calls:
            if (name := call["function"]["name"]) not in said:
                raise UserError(
                    f"the chat template leaves out the call of {name!r} in message {index + 1}: "
                    "use a model whose template writes calls, or leave the turn out"
                )
        if not _holds(said, message["content"]) and self._around(index + 1) is None:
            if not calls:
                raise UserError(f"the chat template leaves out the words of message {index + 1}")
            self.ignored.add("messages.content beside tool_calls")
        for key in REASONING:
            if not _holds(said, str(message.get(key, ""))):
                self.ignored.add(f"messages.{key}")
        return turn

    def _plain_turn(self, index: int) -> Turn:
        full = self._first(index + 1).text
        if index == 0:  # nobody has asked: the template's own words before the turn are no target
            words_only = self._render([{"role": "assistant", "content": MARK}]).text
            begin = _common(full, words_only.partition(MARK)[0])
            return _turn(full, ((begin, len(full)),))
        prompt = self._first(index, prompt=True).text
        if full.startswith(prompt):
            return _turn(full, ((len(prompt), len(full)),))
        return Turn([(prompt, False), (self._answer(index, prompt), True)])

    def _answer(self, index: int, prompt: str) -> str:
        """What follows a generation prompt that is no prefix of the turn's rendering."""
        # The template writes earlier turns otherwise, once this one follows. Both texts from the
        # last message on:
        before = self._with_mark(index)
        asked = self._render(before, prompt=True).text.rpartition(MARK)[2]
        answered = self._render([*before, self.messages[index]]).text.rpartition(MARK)[2]
        if answered.startswith(asked):
            return answered.removeprefix(asked)
        # The generation prompt opens the turn, such as with <think>: then the turn's content and
        # what the template writes after it.
        closed = prompt.rstrip().endswith(CLOSED)  # or opens and closes one
        around = self._around(index + 1)
        if around is None:  # a call without words
            calls = answered[_common(asked, answered) :]
            return calls.rpartition(CLOSED)[2].lstrip("\n") if closed else calls
        words = _unopened(self.messages[index]["content"], prompt)
        if closed and words.lstrip().startswith(OPENED):
            words = words.rpartition(CLOSED)[2].lstrip("\n")
            self.ignored.add(f"messages.content before {CLOSED}")
        return words + around[1]

    def _marked_turn(self, index: int) -> Turn:
        full = self._first(index + 1)
        if index == 0:
            return _turn(full.text, full.marks)
        # The marks from the last message on, without those that were there before this turn.
        before = self._with_mark(index)
        earlier = {(begin, text) for begin, _, text in _marks_after(self._render(before))}
        marks = _marks_after(self._render([*before, self.messages[index]]))
        spans = [
            (len(full.text) - from_end, len(full.text) - from_end + len(text))
            for begin, from_end, text in marks
            if (begin, text) not in earlier
        ]
        prompt = self._first(index, prompt=True).text
        if full.text.startswith(prompt):  # what it says already is no target
            asked = len(prompt)
            spans = [(max(begin, asked), end) for begin, end in spans if end > asked]
        return _turn(full.text, spans)

    def _with_mark(self, count: int) -> list[Message]:
        """The first ``count`` messages, with `MARK` as the content of the last one that has one."""
        last = next((k for k in reversed(range(count)) if self.messages[k]["content"].strip()), 0)
        marked = self.messages[last] | {"content": MARK}
        return [*self.messages[:last], marked, *self.messages[last + 1 : count]]

    def _around(self, count: int) -> tuple[str, str] | None:
        """The texts before and after the content of the last of the first ``count`` messages.

        None if it has none, or the template leaves it out.
        """
        if not self.messages[count - 1]["content"].strip():
            return None
        header, found, end = self._render(self._with_mark(count)).text.rpartition(MARK)
        return (header, end) if found else None

    def _choose_form(self) -> Rendered:
        """Choose the first form of the messages that the template can write, and render it.

        Some want the arguments of tool calls as JSON text: they fail on an object, or print it as
        Python does. Some write only contents that are lists of parts.
        """
        found: list[tuple[Form, Rendered]] = []
        errors = []
        for form in (list, with_encoded_arguments, with_text_parts):
            self._form: Form = form
            try:
                whole = self._render(self.messages)
                if self._suits():
                    return whole
                found.append((form, whole))
            except UserError as error:
                errors.append(error)
        if not found:
            raise errors[0]
        self._form, whole = found[0]
        return whole

    def _suits(self) -> bool:
        """Whether the template writes contents, and arguments not as Python does."""
        contents = [
            message | {"content": MARK} if message["content"].strip() else message
            for message in self.messages
        ]
        if contents != self.messages and MARK not in self._render(contents).text:
            return False
        probe = {MARK: ""}
        calls = any("tool_calls" in message for message in self.messages)
        return (
            not calls or str(probe) not in self._render(with_arguments(self.messages, probe)).text
        )

    def _unread(self) -> set[str]:
        """Names of the keys that the template does not know, and of contents that it leaves out."""
        keys = {key for message in self.messages for key in message}
        keys -= {"role", "content", "tool_call_id"}  # the last is no text
        if any(name in self._source for name in REASONING):
            keys -= {*REASONING}
        names = {f"messages.{key}": key for key in keys} | {
            f"chat_template_kwargs.{key}": key for key in self._options
        }
        if self._tools:
            names["tools"] = "tools"
        unread = {name for name, key in names.items() if key not in _words(self._source)}
        for k, message in enumerate(self.messages):
            role, written = message["role"], _holds(self.whole.text, message["content"])
            if role != "assistant" and not written and self._around(k + 1) is None:
                unread.add(f"messages.content of role {role}")
        return unread

    def _first(self, count: int, prompt: bool = False) -> Rendered:
        """The rendering of the first ``count`` messages, with or without a generation prompt."""
        if count == len(self.messages) and not prompt:
            return self.whole
        if (count, prompt) not in self._known:
            self._known[count, prompt] = self._render(self.messages[:count], prompt)
        return self._known[count, prompt]

    def _render(self, messages: list[Message], prompt: bool = False) -> Rendered:
        messages = self._form(messages)
        try:
            if not self._marked:
                return Rendered(
                    self._tokenizer.apply_chat_template(
                        messages,
                        tools=self._tools,
                        tokenize=False,
                        add_generation_prompt=prompt,
                        **self._options,
                    )
                )
            (text,), (marks,) = render_jinja_template(
                [messages],
                tools=self._tools,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map | self._options,
            )
            return Rendered(text, tuple(marks))
        except Exception as error:  # a template may raise anything
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"the chat template fails on it ({type(error).__name__}: {reason})"
            ) from None


# The next three are facts that all chats share.


@cache
def _has_marks(source: str) -> bool:
    return bool(GENERATION.search(source))


@cache
def _words(source: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", source))


@cache
def _reserved(kind: type[PreTrainedTokenizerBase]) -> frozenset[str]:
    """Names of the parameters of ``apply_chat_template``, which no variable can have."""
    parameters = inspect.signature(kind.apply_chat_template).parameters
    return frozenset(parameters) - {"self", "documents"}


def _holds(text: str, content: str) -> bool:
    """Whether a text holds the end of a content. If not, a template may have changed it."""
    words = content.rpartition(CLOSED)[2].strip()[-END:]
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))


def _marks_after(rendered: Rendered) -> list[tuple[int, int, str]]:
    """The marked texts after `MARK`, with their distances from there and from the text's end."""
    begin = rendered.text.rfind(MARK)
    return [
        (b - begin, len(rendered.text) - b, rendered.text[b:e])
        for b, e in rendered.marks
        if b > begin
    ]


def _unopened(words: str, prompt: str) -> str:
    """The words of a turn without the tag, such as <think>, that its prompt has written already."""
    tag = TAG.search(prompt)
    if tag is None or not words.lstrip().startswith(tag[0].rstrip()):
        return words
    rest = words.lstrip().removeprefix(tag[0].rstrip())
    return rest.removeprefix("\n") if prompt.endswith("\n") else rest


def _turn(text: str, spans: Sequence[Span]) -> Turn:
    return Turn(cut(text, spans), text, tuple(spans))


def cut(text: str, spans: Sequence[Span]) -> list[Part]:
    """Cut a text at the spans of its targets."""
    parts, done = [], 0
    for begin, end in spans:
        parts += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    return [*parts, (text[done:], False)]
