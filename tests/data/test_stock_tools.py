"""Tool calls, and rows of files, with stock templates. All expected texts are written by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.data.stock import (
    BOT,
    TALK,
    USER,
    build,
    messages,
    refused,
    split,
    texts,
    tokenize,
)


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
