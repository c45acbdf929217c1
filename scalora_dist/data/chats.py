"""Renders chats with the tokenizer's template, and finds what the assistant says in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from scalora_dist.config.data import ChatTurns
from scalora_dist.data.encode import Part
from scalora_dist.data.messages import Message, with_encoded_arguments
from scalora_dist.data.prompts import Chat
from scalora_dist.errors import UserError

Span: TypeAlias = tuple[int, int]  # begin and end in a text
WORDS = "WORDS OF THE TURN"  # stands for a turn's content, to find it in a rendering
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers sets all of them
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        text: the rendering; None where the turn's prompt is no prefix of it.
        spans: the targets in ``text``.
    """

    parts: list[Part]
    text: str | None = None
    spans: tuple[Span, ...] = ()


class ChatTemplate:
    """Makes examples of chats.

    Attributes:
        tokenizer: has the template.
        turns: which turns are trained on; None: as the template allows.
        options: variables for the template, where a chat has none of that name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: ChatTurns | None,
        options: dict[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.turns = turns
        self.options = options

    def examples(self, chat: Chat) -> tuple[ChatTurns, list[list[Part]]]:
        """The examples of a chat, each as pieces of its text.

        All assistant turns make one example, if the rendering up to each of them is a prefix of the
        whole. Else each turn makes an example of its own, rendered as at inference: a template may
        write a turn otherwise once more follow.

        Returns:
            which turns each example trains on, and the examples.

        Raises:
            UserError: there is no template, it fails, or it does not allow ``turns``.
        """
        renderings = Renderings(self.tokenizer, chat, self.options | chat.template_options)
        targets = [k for k, hit in enumerate(chat.targets) if hit]
        if self.turns == "last":
            targets = targets[-1:]
        turns = [renderings.turn(k) for k in targets]
        if turns and self.turns in ("last", "each"):
            return self.turns, [turn.parts for turn in turns]
        whole = renderings.render(len(chat.messages)).text
        if all(turn.text is not None and whole.startswith(turn.text) for turn in turns):
            return "all", [_cut(whole, [span for turn in turns for span in turn.spans])]
        if self.turns == "all":
            raise UserError(
                "the chat template renders turns differently once more follow: leave "
                "--chat_turns all out, or set each"
            )
        return "each", [turn.parts for turn in turns]

    def ignored(self, chat: Chat) -> set[str]:
        """Names of what the chat holds and its template does not read."""
        source = self._source(chat.tools)
        keys = {key for message in chat.messages for key in message} - {"role", "content"}
        if any(name in source for name in REASONING):
            keys -= {*REASONING}
        keys |= (self.options | chat.template_options).keys()
        keys |= {"tools"} if chat.tools else set()
        return {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", source)}

    def _source(self, tools: list[Any] | None) -> str:
        return self.tokenizer.get_chat_template(None, tools=tools)


class Renderings:
    """The renderings of the first messages of one chat."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: Chat, options: dict[str, Any]
    ) -> None:
        """Render the whole chat, with ``options`` as variables of the template.

        Raises:
            UserError: there is no template, or it fails.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "it is a chat, but the tokenizer has no chat template: use an instruct model, or "
                "data of another layout"
            )
        self.tokenizer = tokenizer
        self.tools = chat.tools
        self.options = options
        self.messages = chat.messages
        self.source = tokenizer.get_chat_template(None, tools=chat.tools)
        self.marked = bool(GENERATION.search(self.source))
        self._known: dict[tuple[int, bool], Rendered] = {}
        encoded = with_encoded_arguments(chat.messages)
        try:
            whole = self.render(len(self.messages))
            suits = encoded == chat.messages or not _has_python(whole.text, chat.messages)
        except UserError:
            suits = False
            if encoded == chat.messages:
                raise
        if not suits:  # this template wants the arguments of tool calls as JSON text
            self.messages = encoded
            self._known.clear()
            self.render(len(self.messages))

    def turn(self, index: int) -> Turn:
        """The assistant turn at ``index``.

        Raises:
            UserError: the template fails, or leaves out what the turn says.
        """
        turn = self._turn(index)
        said = "".join(text for text, hit in turn.parts if hit)
        for call in self.messages[index].get("tool_calls", ()):
            if (name := call["function"]["name"]) not in said:
                raise UserError(
                    f"the chat template leaves out the call of {name!r} in message {index + 1}"
                )
        return turn

    def _turn(self, index: int) -> Turn:
        full = self.render(index + 1)
        if self.marked:
            before = len(self.render(index).marks) if index else 0
            return _turn(full.text, full.marks[before:])
        prompt = self.render(index, prompt=True).text if index else None
        if prompt is not None and full.text.startswith(prompt):
            return _turn(full.text, ((len(prompt), len(full.text)),))
        # What stands around the turn's words: its header without those of a generation prompt.
        turn = self.messages[index]
        around = self._render([*self.messages[:index], turn | {"content": WORDS}]).text
        header, found, end = around.rpartition(WORDS)
        if prompt is None and found and full.text.startswith(header):
            return _turn(full.text, ((len(header), len(full.text)),))
        if not found:
            raise UserError(f"the chat template leaves out the words of message {index + 1}")
        words = turn["content"]
        if prompt is None:
            prompt = header
        elif prompt.startswith(header):
            words = _without_opening(words, prompt[len(header) :].strip())
        elif not prompt.endswith(blanks := header[len(header.rstrip()) :]):
            words = blanks + words  # which the template writes after the generation prompt
        return Turn([(prompt, False), (words + end, True)])

    def render(self, count: int, prompt: bool = False) -> Rendered:
        """The rendering of the first ``count`` messages, with or without a generation prompt."""
        if (count, prompt) not in self._known:
            self._known[count, prompt] = self._render(self.messages[:count], prompt)
        return self._known[count, prompt]

    def _render(self, messages: list[Message], prompt: bool = False) -> Rendered:
        try:
            if not self.marked:
                return Rendered(
                    self.tokenizer.apply_chat_template(
                        messages,
                        tools=self.tools,
                        tokenize=False,
                        add_generation_prompt=prompt,
                        **self.options,
                    )
                )
            (text,), (marks,) = render_jinja_template(
                [messages],
                tools=self.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map | self.options,
            )
            return Rendered(text, tuple(marks))
        except Exception as error:  # a template may raise anything
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"the chat template fails on it ({type(error).__name__}: {reason})"
            ) from None


def _has_python(text: str, messages: list[Message]) -> bool:
    """Whether a template has written arguments of tool calls as Python would, in single quotes."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    arguments = [call["function"].get("arguments") for call in calls]
    return any(isinstance(given, dict) and given and str(given) in text for given in arguments)


def _without_opening(words: str, opening: str) -> str:
    """The words of a turn whose generation prompt opens it already, such as with <think>."""
    rest = words.lstrip()
    return (
        rest.removeprefix(opening).lstrip("\n") if opening and rest.startswith(opening) else words
    )


def _turn(text: str, spans: tuple[Span, ...]) -> Turn:
    return Turn(_cut(text, spans), text, spans)


def _cut(text: str, spans: list[Span] | tuple[Span, ...]) -> list[Part]:
    """Cut a text at the spans of its targets."""
    parts, done = [], 0
    for begin, end in spans:
        parts += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    return [*parts, (text[done:], False)]
