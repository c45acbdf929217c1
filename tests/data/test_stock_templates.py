"""Chats are trained as the chat templates of common model families render them at inference.

The templates are described in `stock`. All expected texts are written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scalora_dist.config.data import ChatTurns
from scalora_dist.data.prompts import IGNORE
from tests.data.stock import (
    BOT,
    FAMILIES,
    SYSTEM,
    TALK,
    USER,
    Texts,
    build,
    decode,
    messages,
    refused,
    sentencepiece,
    split,
    texts,
    tokenize,
)

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
