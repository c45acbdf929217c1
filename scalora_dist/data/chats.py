"""Makes examples of chats: which assistant turns each of them trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import ChatTurns
from scalora_dist.data.prompts import Chat, Part
from scalora_dist.data.renderings import Renderings, cut
from scalora_dist.errors import UserError


@dataclass(frozen=True)
class ChatExamples:
    """The examples of a chat.

    Attributes:
        turns: which turns each example trains on.
        texts: each example as pieces of its text.
        ignored: names of what the chat holds and the template does not write.
    """

    turns: ChatTurns
    texts: list[list[Part]]
    ignored: set[str]


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

    def examples(self, chat: Chat) -> ChatExamples:
        """The examples of a chat.

        All assistant turns make one example, if the rendering up to each of them is a prefix of the
        whole. Else each turn makes an example of its own, rendered as at inference: a template may
        write a turn otherwise once more follow.

        Raises:
            UserError: there is no template, it fails, it leaves out a turn, or it does not allow
                ``turns``.
        """
        renderings = Renderings(self.tokenizer, chat, self.options | chat.template_options)
        targets = [k for k, hit in enumerate(chat.targets) if hit]
        if self.turns == "last":
            targets = targets[-1:]
        turns = [renderings.turn(k) for k in targets]
        ignored = renderings.ignored
        if turns and self.turns in ("last", "each"):
            return ChatExamples(self.turns, [turn.parts for turn in turns], ignored)
        whole = renderings.whole.text
        if all(turn.text is not None and whole.startswith(turn.text) for turn in turns):
            spans = [span for turn in turns for span in turn.spans]
            return ChatExamples("all", [cut(whole, spans)], ignored)
        if self.turns == "all":
            raise UserError(
                "the chat template writes earlier turns otherwise once later ones follow, so one "
                "example cannot hold all turns: use --chat_turns each"
            )
        return ChatExamples("each", [turn.parts for turn in turns], ignored)
