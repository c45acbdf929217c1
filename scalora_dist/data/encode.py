"""Turns texts into token ids, piece by piece, so that no token spans the start of a target."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from scalora_dist.data.prompts import IGNORE, Part, Texts
from scalora_dist.errors import UserError

ANCHORS = ("\n", "=", "a")


class Encoder:
    """Encodes the parts of a text separately and joins the ids, with their labels.

    So a prompt's ids are those that generation starts from, and the first token of a target counts
    whole. The ids decode to the joined text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False) -> None:
        """
        Args:
            tokenizer: encodes the parts.
            train_on_prompt: whether all ids are targets.
        """
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        added = tokenizer.added_tokens_decoder.items()
        template = str(tokenizer.chat_template or "")
        # With these a rendered text ends. Other special tokens may be words of an answer.
        self.ends = {i for i, token in added if token.content in template}
        self.ends |= {tokenizer.eos_token_id} - {None}
        special = (i for i, token in added if token.special)
        self.special = {*tokenizer.all_special_ids, *special, *self.ends}

    def encode_texts(self, example: Texts) -> tuple[list[int], list[int]]:
        """Return ids and labels of ``[BOS] prompt | completion EOS`` …

        A text that a chat template has rendered begins with BOS and ends in EOS or another token of
        the template: it gets no second one. An empty completion has no target, not even EOS: it is
        more often missing data than an intended empty answer.
        """
        eos = self.tokenizer.eos_token_id
        ids: list[int] = []
        is_target: list[bool] = []
        for prompt, completion in example.pairs:
            more, hits = self._join([(prompt, False), (completion, True)], begins=not ids)
            said = self._said(more)
            if completion and eos is not None and (said == 0 or more[said - 1] not in self.ends):
                more, hits = [*more, eos], [*hits, True]
            ids, is_target = ids + more, is_target + hits
        if self.bos:
            rendered = ids[:1] == self.bos
            ids, is_target = ids if rendered else self.bos + ids, [False, *is_target[rendered:]]
        return ids, self._labels(ids, is_target)

    def encode_parts(self, parts: Iterable[Part]) -> tuple[list[int], list[int]]:
        """Return ids and labels of the joined parts.

        Blanks after the last special token of a part are no target: the model has stopped there.
        """
        ids, is_target = self._join(parts)
        return ids, self._labels(ids, is_target)

    def _join(self, parts: Iterable[Part], begins: bool = True) -> tuple[list[int], list[bool]]:
        """Return ids and which of them are targets; ``begins``: no text is before them."""
        ids: list[int] = []
        is_target: list[bool] = []
        for text, hit in parts:
            more = self._ids(text) if begins and not ids else self._following(text)
            said = self._said(more) if hit else 0
            ids += more
            is_target += [True] * said + [False] * (len(more) - said)
        return ids, is_target

    def _labels(self, ids: list[int], is_target: list[bool]) -> list[int]:
        if self.train_on_prompt:
            return ids
        return [i if hit else IGNORE for i, hit in zip(ids, is_target, strict=True)]

    @cached_property
    def bos(self) -> list[int]:
        """The beginning-of-sequence token; empty if the tokenizer puts none before a text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []

    def _said(self, ids: list[int]) -> int:
        """The number of ids without blanks after the last special token."""
        last = max((k for k, i in enumerate(ids) if i in self.special), default=-1)
        blank = last >= 0 and not decode(self.tokenizer, ids[last + 1 :]).strip()
        return last + 1 if blank else len(ids)

    def _ids(self, text: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except (TypeError, UnicodeError):
            raise UserError("its text has a half of a character (such as \\ud800)") from None

    def _following(self, text: str) -> list[int]:
        """The ids of a text that follows another one.

        Tokenizers of sentencepiece's kind put a blank before a text. So the text is encoded behind
        an anchor, whose ids are cut off.
        """
        for anchor in self._anchors:
            ids = self._behind(anchor, text)
            if ids is not None:
                return ids
        return self._ids(text)

    @cached_property
    def _anchors(self) -> list[str]:
        """Anchors that keep a following text as it is; none where a text needs no anchor."""

        def joined(ids: list[int]) -> str:
            return decode(self.tokenizer, self._ids("a") + ids).lstrip()

        def keeps(anchor: str) -> bool:
            for text in ("b", " b"):
                ids = self._behind(anchor, text)
                if ids is None or joined(ids) != "a" + text:
                    return False
            return True

        if joined(self._ids("b")) == "ab":
            return []
        return [anchor for anchor in ANCHORS if keeps(anchor)]

    def _behind(self, anchor: str, text: str) -> list[int] | None:
        """The ids of a text behind an anchor; None if they share a token."""
        before, both = self._ids(anchor), self._ids(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else None


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, as it is."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
