"""Chats are trained as the chat templates of common model families render them at inference.

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

All expected texts are written by hand.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
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

# TALK, with all turns in one example: the text up to the first answer, the rest, the targets.
IN_ONE: dict[str, tuple[str, str, str]] = {
    "smollm2": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\nuno<|im_end|>\n",
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\ndos<|im_end|>\n",
        "uno<|im_end|>dos<|im_end|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nS\n\none<end_of_turn>\n<start_of_turn>model\nuno<end_of_turn>\n",
        "<start_of_turn>user\ntwo<end_of_turn>\n<start_of_turn>model\ndos<end_of_turn>\n",
        "uno<end_of_turn>dos<end_of_turn>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nuno<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ndos<|eot_id|>",
        "uno<|eot_id|>dos<|eot_id|>",
    ),
    "marked": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nuno<|im_end|>\n",
        "<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\ndos<|im_end|>\n",
        "uno<|im_end|>dos<|im_end|>",
    ),
}
# TALK, with each turn in an example of its own: the history is not rendered as the last turn is.
IN_TWO: dict[str, Texts] = {
    "qwen3": [
        (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nuno<|im_end|>\n",
            "<think>\n\n</think>\n\nuno<|im_end|>",
        ),
        (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
            "<|im_start|>assistant\nuno<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\ndos<|im_end|>\n",
            "<think>\n\n</think>\n\ndos<|im_end|>",
        ),
    ],
    "mistral": [
        ("<s>[INST] S\n\none[/INST] uno</s>", " uno</s>"),
        ("<s>[INST] one[/INST] uno</s>[INST] S\n\ntwo[/INST] dos</s>", " dos</s>"),
    ],
    # The rendering of a finished turn lacks the system text: its generation prompt has it.
    "mistral_last_message": [
        ("<s>[INST] S\n\none[/INST] uno</s>", " uno</s>"),
        ("<s>[INST] one[/INST] uno</s>[INST] S\n\ntwo[/INST] dos</s>", " dos</s>"),
    ],
    # The rendering of a finished turn lacks the thought that its generation prompt opens.
    "r1": [
        (
            "<｜begin▁of▁sentence｜>S<｜User｜>one<｜Assistant｜><think>\nuno<｜end▁of▁sentence｜>",
            "uno<｜end▁of▁sentence｜>",
        ),
        (
            "<｜begin▁of▁sentence｜>S<｜User｜>one<｜Assistant｜>uno<｜end▁of▁sentence｜>"
            "<｜User｜>two<｜Assistant｜><think>\ndos<｜end▁of▁sentence｜>",
            "dos<｜end▁of▁sentence｜>",
        ),
    ],
    # Without the line breaks of the template: the special tokens before them swallow them.
    "phi": [
        (
            "<|system|>S<|end|><|user|>one<|end|><|assistant|>uno<|end|><|endoftext|>",
            "uno<|end|><|endoftext|>",
        ),
        (
            "<|system|>S<|end|><|user|>one<|end|><|assistant|>uno<|end|>"
            "<|user|>two<|end|><|assistant|>dos<|end|><|endoftext|>",
            "dos<|end|><|endoftext|>",
        ),
    ],
}


def in_each(name: str) -> Texts:
    """TALK, with an example for each assistant turn."""
    if name in IN_TWO:
        return IN_TWO[name]
    first, second, targets = IN_ONE[name]
    end = targets.index("dos")
    return [(first, targets[:end]), (first + second, targets[end:])]


@pytest.mark.parametrize("chat_turns", [None, "all"])
@pytest.mark.parametrize("name", IN_ONE)
def test_turns_are_one_example_where_the_template_allows_it(
    name: str, chat_turns: ChatTurns | None
) -> None:
    tokenizer = build(name)
    first, second, targets = IN_ONE[name]
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == first + second
    result = tokenize(tokenizer, TALK, chat_turns=chat_turns)
    assert texts(result, tokenizer) == [(first + second, targets)] and split(result) == 0


@pytest.mark.parametrize("name", IN_TWO)
def test_turns_are_examples_of_their_own_where_history_is_rendered_differently(name: str) -> None:
    tokenizer = build(name)
    result = tokenize(tokenizer, TALK)
    assert texts(result, tokenizer) == IN_TWO[name] and split(result) == 1
    assert "row 1" in refused(tokenizer, TALK, chat_turns="all").lower()
    both = tokenize(tokenizer, TALK[:3], TALK, TALK)  # the first of them has one turn
    assert texts(both, tokenizer) == [*IN_TWO[name][:1], *IN_TWO[name], *IN_TWO[name]]
    assert split(both) == 2


@pytest.mark.parametrize("name", ["mistral", "mistral_last_message"])
def test_without_a_system_text_mistral_renders_history_alike(name: str) -> None:
    tokenizer = build(name)
    result = tokenize(tokenizer, TALK[1:], TALK)  # it is decided for each chat
    whole = "<s>[INST] one[/INST] uno</s>[INST] two[/INST] dos</s>"
    assert texts(result, tokenizer) == [(whole, " uno</s> dos</s>"), *IN_TWO[name]]
    assert split(result) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_and_the_last_turn_can_be_asked_for(name: str) -> None:
    tokenizer = build(name)
    each = tokenize(tokenizer, TALK, chat_turns="each")
    assert texts(each, tokenizer) == in_each(name) and split(each) == 1
    last = tokenize(tokenizer, TALK, chat_turns="last")
    assert texts(last, tokenizer) == in_each(name)[1:] and split(last) == 0


def runs(labels: list[int]) -> Iterator[int]:
    """Where a run of targets begins."""
    for i, label in enumerate(labels):
        if label != IGNORE and (i == 0 or labels[i - 1] == IGNORE):
            yield i


@pytest.mark.parametrize("chat_turns", [None, "each"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "marked"])
def test_what_precedes_a_turn_is_its_generation_prompt(
    name: str, chat_turns: ChatTurns | None
) -> None:
    tokenizer = build(name)
    found = [
        row["input_ids"][:begin]
        for row in tokenize(tokenizer, TALK, chat_turns=chat_turns).dataset
        for begin in runs(row["labels"])
    ]
    assert found == [
        tokenizer.apply_chat_template(TALK[:turn], add_generation_prompt=True, return_dict=False)
        for turn in (2, 4)
    ]


@pytest.mark.parametrize("chat_turns", [None, "last", "each"])
def test_no_token_spans_the_end_of_the_prompt(chat_turns: ChatTurns | None) -> None:
    tokenizer = build("smollm2", merges=(("Ċ", "Ċ"),))  # Ċ is the line break
    chat = messages((SYSTEM, "S"), (USER, "one"), (BOT, "\nuno"))
    joined = tokenizer.apply_chat_template(chat, return_dict=False)
    assert tokenizer.convert_tokens_to_ids("ĊĊ") in joined
    (row,) = tokenize(tokenizer, chat, chat_turns=chat_turns).dataset
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=False)
    (begin,) = runs(row["labels"])
    assert row["input_ids"][:begin] == prompt
    targets = [label for label in row["labels"] if label != IGNORE]
    assert decode(tokenizer, targets) == "\nuno<|im_end|>"


@pytest.mark.parametrize(
    ("name", "whole", "targets"),
    [
        (
            "gemma",
            "<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\nuno<end_of_turn>\n",
            "uno<end_of_turn>",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Today Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nuno<|eot_id|>",
            "uno<|eot_id|>",
        ),
    ],
)
def test_contents_are_trimmed_where_the_template_trims(name: str, whole: str, targets: str) -> None:
    tokenizer = build(name)
    result = tokenize(tokenizer, messages((USER, " one\n"), (BOT, "\n uno \n")))
    assert texts(result, tokenizer) == [(whole, targets)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "smollm2",
            [
                (
                    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                    "Hugging Face<|im_end|>\n<|im_start|>assistant\nWelcome.<|im_end|>\n"
                    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n",
                    "Welcome.<|im_end|>Yes?<|im_end|>",
                )
            ],
        ),
        (
            "llama3",
            [
                (
                    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
                    "Today Date: 26 Jul 2024\n\n<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\nWelcome.<|eot_id|>"
                    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>",
                    "Welcome.<|eot_id|>Yes?<|eot_id|>",
                )
            ],
        ),
        (
            "qwen3",
            [
                (
                    "<|im_start|>assistant\nWelcome.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                    "<|im_start|>assistant\n<think>\n\n</think>\n\nYes?<|im_end|>\n",
                    "Welcome.<|im_end|><think>\n\n</think>\n\nYes?<|im_end|>",
                )
            ],
        ),
        (
            "marked",
            [
                (
                    "<|im_start|>assistant\n<think>\n\n</think>\n\nWelcome.<|im_end|>\n"
                    "<|im_start|>user\nHi<|im_end|>\n"
                    "<|im_start|>assistant\n<think>\n\n</think>\n\nYes?<|im_end|>\n",
                    "Welcome.<|im_end|>Yes?<|im_end|>",
                )
            ],
        ),
        (
            "r1",
            [
                (
                    "<｜begin▁of▁sentence｜><｜Assistant｜>Welcome.<｜end▁of▁sentence｜>",
                    "Welcome.<｜end▁of▁sentence｜>",
                ),
                (
                    "<｜begin▁of▁sentence｜><｜Assistant｜>Welcome.<｜end▁of▁sentence｜>"
                    "<｜User｜>Hi<｜Assistant｜><think>\nYes?<｜end▁of▁sentence｜>",
                    "Yes?<｜end▁of▁sentence｜>",
                ),
            ],
        ),
        (
            "phi",
            [
                (
                    "<|assistant|>Welcome.<|end|><|endoftext|>",
                    "Welcome.<|end|><|endoftext|>",
                ),
                (
                    "<|assistant|>Welcome.<|end|><|user|>Hi<|end|><|assistant|>Yes?<|end|>"
                    "<|endoftext|>",
                    "Yes?<|end|><|endoftext|>",
                ),
            ],
        ),
    ],
)
def test_a_chat_that_the_assistant_opens(name: str, expected: Texts) -> None:
    tokenizer = build(name)
    chat = messages((BOT, "Welcome."), (USER, "Hi"), (BOT, "Yes?"))
    result = tokenize(tokenizer, chat)
    assert texts(result, tokenizer) == expected and split(result) == len(expected) - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_that_the_user_ends(name: str) -> None:
    tokenizer = build(name)
    result = tokenize(tokenizer, TALK[:4])
    ((whole, targets),) = texts(result, tokenizer)
    expected_whole, expected_targets = in_each(name)[0]
    assert targets == expected_targets and split(result) == 0
    if name in IN_ONE:  # what follows the turn may be there, or not: it is no target
        assert whole.startswith(expected_whole.rstrip("\n"))
    else:
        assert whole == expected_whole


def test_a_chat_without_an_assistant_is_left_out() -> None:
    tokenizer = build("qwen3")
    result = tokenize(tokenizer, TALK[:2], TALK)
    assert texts(result, tokenizer) == IN_TWO["qwen3"]
    assert (split(result), result.dropped) == (1, 1)


@pytest.mark.parametrize("name", ["qwen3", "r1"])
def test_a_completion_of_messages_trains_its_own_turns_only(name: str) -> None:
    tokenizer = build(name)
    result = tokenize(tokenizer, {"prompt": TALK[:4], "completion": TALK[4:]})
    assert texts(result, tokenizer) == IN_TWO[name][1:] and split(result) == 0


def test_the_prompt_is_trained_too_where_that_is_asked_for() -> None:
    tokenizer = build("r1")
    result = tokenize(tokenizer, TALK, train_on_prompt=True)
    assert texts(result, tokenizer) == [(whole, whole) for whole, _ in IN_TWO["r1"]]


THOUGHT = messages(
    (USER, "one"), (BOT, "<think>\nhm\n</think>\n\nuno"), (USER, "two"), (BOT, "dos")
)


@pytest.mark.parametrize("apart", [False, True])
def test_thoughts_of_qwen3(apart: bool) -> None:
    tokenizer = build("qwen3")
    chat = THOUGHT
    if apart:
        turn = {"role": BOT, "content": "uno", "reasoning_content": "hm"}
        chat = [THOUGHT[0], turn, *THOUGHT[2:]]
    result = tokenize(tokenizer, chat)
    assert split(result) == 1
    assert texts(result, tokenizer) == [
        (
            "<|im_start|>user\none<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nhm\n</think>\n\nuno<|im_end|>\n",
            "<think>\nhm\n</think>\n\nuno<|im_end|>",
        ),
        (
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nuno<|im_end|>\n"
            "<|im_start|>user\ntwo<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\ndos<|im_end|>\n",
            "<think>\n\n</think>\n\ndos<|im_end|>",
        ),
    ]


@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_of_r1(opened: bool) -> None:
    tokenizer = build("r1")
    chat = THOUGHT
    if not opened:  # what the model writes after its generation prompt
        chat = [THOUGHT[0], {"role": BOT, "content": "hm\n</think>\n\nuno"}, *THOUGHT[2:]]
    result = tokenize(tokenizer, chat)
    assert split(result) == 1
    assert texts(result, tokenizer) == [
        (
            "<｜begin▁of▁sentence｜><｜User｜>one<｜Assistant｜><think>\nhm\n</think>\n\nuno"
            "<｜end▁of▁sentence｜>",
            "hm\n</think>\n\nuno<｜end▁of▁sentence｜>",
        ),
        (
            "<｜begin▁of▁sentence｜><｜User｜>one<｜Assistant｜>\n\nuno<｜end▁of▁sentence｜>"
            "<｜User｜>two<｜Assistant｜><think>\ndos<｜end▁of▁sentence｜>",
            "dos<｜end▁of▁sentence｜>",
        ),
    ]


def tool(name: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Two tools, and so two sets of keys: those of one are not to turn up in the other.
TOOLS = [tool("weather", "city"), tool("clock", "zone")]
TOOL_TEXTS = [
    '{"type": "function", "function": {"name": "weather", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}}',
    '{"type": "function", "function": {"name": "clock", "parameters": '
    '{"type": "object", "properties": {"zone": {"type": "string"}}}}}',
]


def call(arguments: Any, **others: Any) -> dict[str, Any]:
    """A chat in which the assistant calls a tool and then answers.

    Args:
        arguments: of the call.
        others: fields that both assistant turns have.
    """
    function = {"name": "weather", "arguments": arguments}
    calls = [{"type": "function", "function": function}]
    return {
        "messages": [
            {"role": USER, "content": "Oslo?"},
            {"role": BOT, "content": "", "tool_calls": calls, **others},
            {"role": "tool", "content": "snow"},
            {"role": BOT, "content": "It snows.", **others},
        ],
        "tools": TOOLS,
    }


as_dict_and_as_json = pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
from_both = pytest.mark.parametrize("from_file", [False, True])


@as_dict_and_as_json
@from_both
def test_tool_calls_of_llama3(arguments: Any, from_file: bool) -> None:
    tokenizer = build("llama3")
    result = tokenize(tokenizer, call(arguments), from_file=from_file)
    assert texts(result, tokenizer) == [
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Environment: ipython\nToday Date: 26 Jul 2024\n\n"
            f"{TOOL_TEXTS[0]}\n\n{TOOL_TEXTS[1]}\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nOslo?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
            "<|start_header_id|>ipython<|end_header_id|>\n\nsnow<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nIt snows.<|eot_id|>",
            '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
            "It snows.<|eot_id|>",
        )
    ]


QWEN3_TOOLS = (
    "<|im_start|>system\n# Tools\n\n<tools>\n"
    f"{TOOL_TEXTS[0]}\n{TOOL_TEXTS[1]}\n</tools><|im_end|>\n"
)
QWEN3_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
QWEN3_RESULT = "<|im_start|>user\n<tool_response>\nsnow\n</tool_response><|im_end|>\n"


@as_dict_and_as_json
@from_both
def test_tool_calls_of_qwen3(arguments: Any, from_file: bool) -> None:
    # Once the answer follows, the call is rendered without its empty thought.
    tokenizer = build("qwen3")
    result = tokenize(tokenizer, call(arguments), from_file=from_file)
    assert split(result) == 1
    assert texts(result, tokenizer) == [
        (
            f"{QWEN3_TOOLS}<|im_start|>user\nOslo?<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\n\n</think>\n\n{QWEN3_CALL}<|im_end|>\n",
            f"<think>\n\n</think>\n\n{QWEN3_CALL}<|im_end|>",
        ),
        (
            f"{QWEN3_TOOLS}<|im_start|>user\nOslo?<|im_end|>\n"
            f"<|im_start|>assistant\n{QWEN3_CALL}<|im_end|>\n{QWEN3_RESULT}"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nIt snows.<|im_end|>\n",
            "<think>\n\n</think>\n\nIt snows.<|im_end|>",
        ),
    ]


def test_tool_calls_of_qwen3_with_thoughts_are_one_example() -> None:
    # A thought is kept until the user's next turn.
    tokenizer = build("qwen3")
    result = tokenize(tokenizer, call({"city": "Oslo"}, reasoning_content="hm"))
    assert split(result) == 0
    assert texts(result, tokenizer) == [
        (
            f"{QWEN3_TOOLS}<|im_start|>user\nOslo?<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\nhm\n</think>\n\n{QWEN3_CALL}<|im_end|>\n"
            f"{QWEN3_RESULT}<|im_start|>assistant\n<think>\nhm\n</think>\n\nIt snows.<|im_end|>\n",
            f"<think>\nhm\n</think>\n\n{QWEN3_CALL}<|im_end|>"
            "<think>\nhm\n</think>\n\nIt snows.<|im_end|>",
        )
    ]


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@from_both
def test_a_tool_call_may_have_no_content(name: str, from_file: bool) -> None:
    tokenizer = build(name)
    row = call({"city": "Oslo"})
    expected = texts(tokenize(tokenizer, row, from_file=from_file), tokenizer)
    row["messages"][1]["content"] = None
    assert texts(tokenize(tokenizer, row, from_file=from_file), tokenizer) == expected


@pytest.mark.parametrize("name", ["gemma", "mistral"])
@from_both
def test_roles_that_the_template_refuses_are_named_with_their_row(
    name: str, from_file: bool
) -> None:
    tokenizer = build(name)
    twice = messages((USER, "one"), (USER, "two"), (BOT, "dos"))
    opened = messages((BOT, "uno"), (USER, "two"), (BOT, "dos"))
    for chats, row in (((twice, TALK), 1), ((opened,), 1), ((TALK, twice), 2)):
        for chat_turns in (None, "each"):
            message = refused(tokenizer, *chats, from_file=from_file, chat_turns=chat_turns)
            assert re.search(rf"\brow {row}\b", message.lower()) and "alternate" in message


@pytest.mark.parametrize(
    ("name", "wholes", "targets"),
    [
        (
            "mistral",
            [
                "<s>[INST] S\n\none[/INST] uno</s>",
                "<s>[INST] one[/INST] uno</s>[INST] S\n\ntwo[/INST] uno</s>",
            ],
            ["▁uno", "</s>"],
        ),
        (
            "phi",
            [
                "<|system|>S<|end|><|user|>one<|end|><|assistant|>uno<|end|><|endoftext|>",
                "<|system|>S<|end|><|user|>one<|end|><|assistant|>uno<|end|>"
                "<|user|>two<|end|><|assistant|>uno<|end|><|endoftext|>",
            ],
            ["uno", "<|end|>", "<|endoftext|>"],
        ),
    ],
)
def test_a_tokenizer_that_writes_blanks_writes_none_before_a_turn(
    name: str, wholes: list[str], targets: list[str]
) -> None:
    tokenizer = sentencepiece(name)
    chat = [*TALK[:4], {"role": BOT, "content": "uno"}]
    result = tokenize(tokenizer, chat)
    assert [whole for whole, _ in texts(result, tokenizer)] == wholes
    for row in result.dataset:
        found = [label for label in row["labels"] if label != IGNORE]
        assert tokenizer.convert_ids_to_tokens(found) == targets
