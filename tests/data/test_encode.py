"""Joined parts: their ids decode to the joined text, and targets are what the model must say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from scalora_dist.data.encode import Encoder
from scalora_dist.data.prompts import IGNORE, Part, Texts
from scalora_dist.errors import UserError


def sentencepiece(*merged: str) -> LlamaTokenizer:
    """A tokenizer of Llama 2's kind: it puts a blank before a text, and BOS."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for letter in [chr(c) for c in range(33, 127)] + ["▁", "\n"]:
        vocabulary.setdefault(letter, len(vocabulary))
    merges = []
    for word in merged:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


FOUR = ("▁four", "four", "==", "\n\n")


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def targets(parts: list[Part] | Texts, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The whole text, and the tokens of the targets."""
    encoder = Encoder(tokenizer)
    if isinstance(parts, Texts):
        ids, labels = encoder.encode_texts(parts)
    else:
        ids, labels = encoder.encode_parts(parts)
    assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))
    said = [label for label in labels if label != IGNORE]
    return decoded(ids, tokenizer), tokenizer.convert_ids_to_tokens(said)


@pytest.mark.parametrize(
    ("completion", "tokens"),
    [
        ("four", ["four"]),
        (" four", ["▁four"]),
        ("\nfour", ["\n", "four"]),
        ("\n\n", ["\n\n"]),
        ("= four", ["=", "▁four"]),
    ],
)
@pytest.mark.parametrize("prompt", ["2+2=", "x ", "x\n", "<s>x"])
def test_a_completion_gets_no_blank_of_its_own(
    prompt: str, completion: str, tokens: list[str]
) -> None:
    tokenizer = sentencepiece(*FOUR)
    text, said = targets(Texts(((prompt, completion),)), tokenizer)
    # Llama's own blank before the text is kept.
    assert text.replace("<s> ", "<s>") == "<s>" + prompt.removeprefix("<s>") + completion + "</s>"
    assert said == [*tokens, "</s>"]


def test_the_first_part_is_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = sentencepiece(*FOUR)
    whole, _ = Encoder(tokenizer).encode_texts(Texts((("", "four"),)))
    assert whole == [*tokenizer("four")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(whole) == ["<s>", "▁four", "</s>"]


def test_a_tokenizer_that_adds_blanks_between_bytes() -> None:
    """Byte-level BPE with add_prefix_space, as some GPT-2 tokenizers have."""
    from tests.data.conftest import build_tokenizer

    tokenizer = build_tokenizer(blank=True)
    text, said = targets([("ab", False), ("cd", True), (" ef", False)], tokenizer)
    assert text == " abcd ef" and said == ["c", "d"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("end", ["</s>", "</s>\n", "<|end|>\n"])
def test_rendered_text_gets_no_second_bos_or_eos(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase], bos: bool, end: str
) -> None:
    tokenizer = make_tokenizer("{{ messages }}<|end|>", bos=bos)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)], special_tokens=True)
    mark = end.strip()
    for pair in ("", "<s>[Q] [A]yes" + end), ("<s>[Q] [A]", "yes" + end):
        text, said = targets(Texts((pair,)), tokenizer)
        assert text == "<s>[Q] [A]yes" + end
        assert said[-1] == mark and "".join(said).endswith("yes" + mark)
        assert said.count(mark) == 1
    # A special token within the text ends nothing, nor does one that is not of the template.
    text, said = targets(Texts((("<s>a", "b" + end + "c"),)), tokenizer)
    assert text == "<s>ab" + end + "c</s>" and said[-1] == "</s>"
    text, said = targets(Texts((("<s>a", "<s>"),)), tokenizer)
    assert text == "<s>a<s></s>" and said == ["<s>", "</s>"]


def test_an_empty_completion_has_no_target(tokenizer: PreTrainedTokenizerBase) -> None:
    assert targets(Texts((("prompt", ""),)), tokenizer) == ("prompt", [])


def test_each_answer_of_a_history_is_a_target(tokenizer: PreTrainedTokenizerBase) -> None:
    text, said = targets(Texts((("Q1", "A"), ("Q2", "B"))), tokenizer)
    assert text == "Q1A</s>Q2B</s>" and said == ["A", "</s>", "B", "</s>"]


def test_half_a_character_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="half of a character"):
        Encoder(tokenizer).encode_texts(Texts((("a", "\ud83d"),)))


def test_texts_join_with_a_real_tokenizer(demo_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text, said = targets(Texts((("Answer: ", "yes"),)), tokenizer)
    assert text == "Answer: yes<|im_end|>" and said == ["yes", "<|im_end|>"]
