"""The columns of an example: which are read, how, and which are named as not used."""

from __future__ import annotations

from typing import Any

import pytest

from scalora_dist.data.prompts import Chat, Row, Texts, Tokens, from_templates, recognise
from scalora_dist.errors import UserError

USER = {"role": "user", "content": "one"}
BOT = {"role": "assistant", "content": "uno"}
CALL = {"name": "clock", "arguments": {"city": "Oslo"}}
CALLS = [{"type": "function", "function": CALL}]


def read(**columns: Any) -> tuple[Any, set[str]]:
    """The example, and the names of what was not used."""
    row = Row(columns)
    example = recognise(columns).read(row)
    return example, row.ignored() | (example.ignored if isinstance(example, Chat) else set())


def refused(**columns: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(**columns)
    return str(caught.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [USER, BOT]},
        {"prompt": [USER], "completion": [BOT]},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "uno"}]},
        {"conversations": [USER, BOT]},
        {"conversations": {"from": ["human", "GPT"], "value": ["one", "uno"]}},
        {"messages": [{"role": "Human", "content": "one"}, {"from": "ai", "value": "uno"}]},
        {"messages": [USER | {"content": [{"type": "text", "text": "one"}]}, BOT]},
        {"messages": [USER | {"content": [{"type": "text", "text": "o"}, "ne"]}, BOT]},
        {"messages": [USER | {"name": None}, BOT | {"tool_calls": None, "weight": None}]},
        {"messages": [USER | {"tool_calls": ""}, BOT | {"tool_calls": []}]},
    ],
)
def test_chats_of_all_spellings_are_the_same(columns: dict[str, Any]) -> None:
    assert read(**columns) == (Chat([USER, BOT], [False, True]), set())


@pytest.mark.parametrize("key", ["weight", "train"])
def test_a_turn_says_whether_it_is_a_target(key: str) -> None:
    off, on = BOT | {key: 0}, BOT | {key: True}
    example, ignored = read(messages=[USER, off, USER, on])
    assert example.messages == [USER, BOT, USER, BOT]  # the template does not see the mark
    assert example.targets == [False, False, False, True] and not ignored
    assert read(messages=[USER | {key: 0}, BOT])[1] == set()
    assert read(messages=[USER | {key: 1}, BOT])[1] == {f"messages.{key}"}
    assert "message 2 of 'messages': its weight is 0.5" in refused(
        messages=[USER, BOT | {"weight": 0.5}]
    )


def test_a_turn_that_says_nothing_is_no_target() -> None:
    empty: tuple[Any, ...] = ("", " \n", [])
    for nothing in empty:
        turn = {"role": "assistant", "content": nothing, "tool_calls": []}
        assert read(messages=[USER, turn])[0].targets == [False, False]


def test_a_system_column_opens_the_chat() -> None:
    example, ignored = read(messages=[USER, BOT], system="Be brief")
    assert example.messages == [{"role": "system", "content": "Be brief"}, USER, BOT]
    assert example.targets == [False, False, True] and not ignored
    own = {"role": "system", "content": "S"}
    example, ignored = read(messages=[own, USER, BOT], system="Be brief")
    assert example.messages[0] == own and ignored == {"system"}


@pytest.mark.parametrize(
    "turn",
    [
        BOT | {"content": None, "tool_calls": CALLS},
        BOT | {"content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": CALL}]},
        BOT
        | {
            "content": "",
            "tool_calls": [{"function": CALL | {"arguments": '{"city": "Oslo"}'}}],
        },
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"city": "Oslo"}}'},
        {"role": "tool_call", "content": '[{"name": "clock", "arguments": {"city": "Oslo"}}]'},
        BOT | {"content": None, "function_call": CALL},
        BOT | {"content": "", "tool_calls": [{"name": "clock", "parameters": {"city": "Oslo"}}]},
        BOT
        | {
            "content": "",
            "tool_calls": [{"function": {"name": "clock", "args": CALL["arguments"]}}],
        },
    ],
)
def test_tool_calls_of_all_spellings_are_the_same(turn: dict[str, Any]) -> None:
    result = {"from": "observation", "value": "12:00"}
    example, _ = read(conversations=[USER, turn, result])
    assert example.messages == [
        USER,
        BOT | {"content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "12:00"},
    ]
    assert example.targets == [False, True, False]


def test_tools_are_definitions_or_their_json_text() -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    text = '{"type": "function", "function": {"name": "clock", "parameters": {}}}'
    for given in (tools, f"[{text}]", [text]):
        assert read(messages=[USER, BOT], tools=given)[0].tools == tools
    empty: tuple[Any, ...] = (None, "", [])
    for nothing in empty:
        assert read(messages=[USER, BOT], tools=nothing)[0].tools is None
    assert "'tools'" in refused(messages=[USER, BOT], tools="clock")


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("hello", "an object with a role"),
        ({"content": "x"}, "must have a role"),
        ({"role": "user", "text": "x"}, "must have a content"),
        ({"role": "assistant", "content": None}, "must have a content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of type 'image_url'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a function with a name"),
        ({"from": "function_call"}, "a list of objects"),
        ({"from": 7, "value": "x"}, "must have a role"),
    ],
)
def test_bad_messages_are_named_by_number(turn: Any, reason: str) -> None:
    message = refused(messages=[BOT, turn])
    assert message.startswith("message 2 of 'messages': ") and reason in message


def test_alpaca_uses_system_and_history() -> None:
    example, ignored = read(
        instruction="Say hello",
        input="to me",
        output="bonjour",
        system="Speak French",
        history=[["who?", "me"]],
    )
    assert example == Texts(
        (
            ("Speak French\n\n### Instruction:\nwho?\n\n### Response:\n", "me"),
            (
                "\n\n### Instruction:\nSay hello\n\n### Input:\nto me\n\n### Response:\n",
                "bonjour",
            ),
        )
    )
    assert not ignored
    for bad in (["who?"], 5, [["a"]], [["a", None]]):
        assert "'history'" in refused(instruction="a", output="b", history=bad)


def test_columns_that_hold_something_and_are_not_used_are_named() -> None:
    assert read(question="Q", answer="A", source="web", note=None, id=7)[1] == {"source", "id"}
    assert read(prompt="Q", completion="A", tools=[{"name": "x"}])[1] == {"tools"}
    assert read(messages=[USER, BOT], text="rendered")[1] == {"text"}


def test_templates_fill_in_any_columns() -> None:
    shape = from_templates(r"{#1 String}\n{{or}}\n{a.b[0]}: ", "{score}{yes}")
    assert shape.columns == ("#1 String", "a.b[0]", "score", "yes")
    row = Row({"#1 String": "{x}", "a.b[0]": "c\\n", "score": 2.5, "yes": True, "other": "o"})
    assert shape.read(row) == Texts((("{x}\n{or}\nc\\n: ", "2.5true"),))
    assert row.ignored() == {"other"}
    with pytest.raises(UserError, match="'score' is null"):
        shape.read(Row({"#1 String": "", "a.b[0]": "", "score": None, "yes": ""}))
    with pytest.raises(UserError, match="'score' is nan, which is no number"):
        shape.read(Row({"#1 String": "", "a.b[0]": "", "score": float("nan"), "yes": ""}))
    with pytest.raises(UserError, match=r"names no \{column\}"):
        from_templates("{a}", "yes")
    for lone in ("{", "a } b", "{}"):
        with pytest.raises(UserError, match="a lone"):
            from_templates(lone, "")


def test_missing_null_and_wrong_fields_are_told_apart() -> None:
    shape = recognise(["prompt", "completion"])
    for row, reason in (
        ({"prompt": "p"}, "the field 'completion' is missing"),
        ({"prompt": "p", "completion": None}, "the field 'completion' is null"),
        ({"prompt": "p", "completion": 4}, "the field 'completion' is of type int"),
    ):
        with pytest.raises(UserError, match=reason):
            shape.read(Row(row))


def test_tokens_are_taken_as_they_are() -> None:
    assert read(input_ids=[5, 6, 7], text="abc") == (Tokens([5, 6, 7], [5, 6, 7]), {"text"})
    example, ignored = read(
        input_ids=[0, 5, 5, 5], labels=[-100, -100, 5, 5], attention_mask=[False, 1, 1, True]
    )
    assert example == Tokens([5, 5, 5], [-100, 5, 5]) and not ignored
    assert read(input_ids=[1, 2, 3], labels=[-100, 9, 3])[0].labels == [-100, 9, 3]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"input_ids": [1, 2.0]}, "'input_ids' must be a list of token ids"),
        ({"input_ids": [1, -1]}, "'input_ids'"),
        ({"input_ids": [1, 2**31]}, "'input_ids'"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "a list of 0 and 1"),
        ({"input_ids": "text"}, "'input_ids'"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids, but 1 labels"),
        ({"input_ids": [1, 2], "labels": [-100, -200]}, "'labels'"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "shifted"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "between tokens"),
    ],
)
def test_bad_tokens_are_refused(columns: dict[str, Any], reason: str) -> None:
    assert reason in refused(**columns)
