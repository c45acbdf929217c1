"""The chat templates of common model families, and tokenizers for them.

The templates are in `templates/`. Two are the original text:

* smollm2.jinja: of HuggingFaceTB/SmolLM2-135M-Instruct, as `tools/demo_model.py` unpacks it.
* gemma.jinja: of google/gemma-3-*-it, as it is in the PyPI package `trl`
  (`trl/chat_templates/gemma3.jinja`, Apache-2.0).

The others are our own text, each with what is particular to its family:

* llama3: a system turn with the date is always there, contents are trimmed.
* qwen3: thoughts are shown after the user's last turn only. The last answer has always some.
* mistral: the system text is in the user's last turn. Roles must alternate.
* mistral_last_message: the system text is there only while a reply is asked for.
* r1: the generation prompt opens a thought, but no assistant turn shows one.
* phi: a text that asks for no reply ends with EOS.
* marked: has {% generation %} marks.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalora_dist.config.data import ChatTurns, DataArguments
from scalora_dist.data.prompts import IGNORE
from scalora_dist.data.rows import FROM_FILE
from scalora_dist.data.tokenize import Tokenized, tokenize_examples
from scalora_dist.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
Message = dict[str, Any]
Texts = list[tuple[str, str]]  # of each example: the whole text, the text of the targets


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer has beside bytes.

    Attributes:
        eos: end-of-sequence token.
        special: special tokens that the template writes.
        bos: beginning-of-sequence token, which the tokenizer puts before each plain text.
        plain: added tokens that are not special.
        rstrip: whether special tokens swallow the blanks and line breaks after them.
    """

    eos: str
    special: tuple[str, ...]
    bos: str | None = None
    plain: tuple[str, ...] = ()
    rstrip: bool = False


CHATML = Family("<|im_end|>", ("<|im_start|>", "<|im_end|>"), plain=("<think>", "</think>"))
MISTRAL = Family("</s>", ("[INST]", "[/INST]", "</s>"), bos="<s>")
PHI_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FAMILIES = {
    "smollm2": CHATML,
    "gemma": Family("<eos>", ("<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>"),
    "llama3": Family(
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
    ),
    "qwen3": CHATML,
    "mistral": MISTRAL,
    "mistral_last_message": MISTRAL,
    "r1": Family(
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        plain=("<think>", "</think>"),
    ),
    "phi": Family("<|endoftext|>", ("<|endoftext|>", *PHI_TOKENS), rstrip=True),
    "marked": CHATML,
}


def build(name: str, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of one id per byte and per added token, with the template of that name.

    Args:
        name: of a family in `FAMILIES`.
        merges: pairs of byte-level characters that become one token.
    """
    family = FAMILIES[name]
    characters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    vocab = {character: i for i, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = family.special if family.bos is None else (family.bos, *family.special)
    backend.add_special_tokens([AddedToken(s, special=True, rstrip=family.rstrip) for s in special])
    backend.add_tokens([AddedToken(token, special=False) for token in family.plain])
    if family.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos
    )
    tokenizer.chat_template = template(name)
    return tokenizer


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def sentencepiece(name: str) -> LlamaTokenizer:
    """A tokenizer that writes a blank before a text, as those of Llama 2, Mistral and Phi-3."""
    characters = [*map(chr, range(33, 127)), "▁", "\n", "un", "uno", "▁u", "▁un", "▁uno"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=[("▁", "u"), ("▁u", "n"), ("▁un", "o"), ("u", "n"), ("un", "o")],
        bos_token="<s>",
        eos_token=FAMILIES[name].eos,
    )
    if name == "phi":
        added = [AddedToken(token, special=True, rstrip=True) for token in PHI_TOKENS]
        tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = template(name)
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    *chats: list[Message] | dict[str, Any],
    from_file: bool = False,
    chat_turns: ChatTurns | None = None,
    train_on_prompt: bool = False,
) -> Tokenized:
    """Tokenize chats: lists of messages, or rows. `from_file` gives them as a data file's rows."""
    rows = [{"messages": chat} if isinstance(chat, list) else chat for chat in chats]
    if from_file:
        rows = [
            dict(
                zip(
                    FROM_FILE,
                    (json.dumps(row), "d.jsonl", number, number, '["messages"]', ""),
                    strict=True,
                )
            )
            for number, row in enumerate(rows, start=1)
        ]
    args = DataArguments(chat_turns=chat_turns, train_on_prompt=train_on_prompt)
    return tokenize_examples(Dataset.from_list(rows), tokenizer, args)


def split(result: Tokenized) -> int:
    """The number of chats that were made into several examples."""
    return sum(count > 1 for count in Counter(result.dataset["row"][:]).values())


def texts(result: Tokenized, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The whole text of each example, and the text of its targets."""
    found = []
    for row in result.dataset:
        ids, labels = row["input_ids"], row["labels"]
        assert all(t in (IGNORE, i) for t, i in zip(labels, ids, strict=True))
        found.append(
            (decode(tokenizer, ids), decode(tokenizer, [t for t in labels if t != IGNORE]))
        )
    return found


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def refused(tokenizer: PreTrainedTokenizerBase, *chats: list[Message], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        tokenize(tokenizer, *chats, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def messages(*turns: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


USER, BOT, SYSTEM = "user", "assistant", "system"
TALK = messages((SYSTEM, "S"), (USER, "one"), (BOT, "uno"), (USER, "two"), (BOT, "dos"))
