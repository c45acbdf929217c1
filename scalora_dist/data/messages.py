"""Reads chat messages as other programs write them, in the form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scalora_dist.errors import UserError

Message = dict[str, Any]

# Other spellings of roles, as in ShareGPT's `from`. Other names are the template's business.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose content is a call
DECIDES_TARGETS = ("weight", "train")  # OpenAI's 0 or 1, axolotl's true or false


@dataclass(frozen=True)
class Messages:
    """Chat messages as templates read them.

    Attributes:
        messages: each has a role, a content (a string) and what else was given.
        targets: whether each message is one to train on.
        excludes: whether an assistant message says that it is none.
        ignored: names of keys that have no effect here.
    """

    messages: list[Message]
    targets: list[bool]
    excludes: bool
    ignored: frozenset[str] = frozenset()


def read_messages(value: Any, name: str) -> Messages:
    """Read the messages in the column `name`.

    Roles are under ``role`` or ShareGPT's ``from``, texts under ``content`` or ``value``. Every
    assistant message that says something is a target, unless its ``weight`` is 0 or its ``train``
    is false.

    Raises:
        UserError: it is no list of messages.
    """
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        # As `datasets` used to hold lists of objects.
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise UserError(f"the field {name!r} must be a list of at least one chat message")
    messages, targets, excludes, ignored = [], [], False, set()
    for number, given in enumerate(value, start=1):
        try:
            message = _read_message(given)
            marked = {key: _decides(message, key) for key in DECIDES_TARGETS if key in message}
        except UserError as error:
            raise UserError(f"message {number} of {name!r}: {error}") from None
        is_answer = message["role"] == "assistant"
        # An empty one is more often missing data than an intended empty answer.
        says = bool(message["content"].strip() or "tool_calls" in message)
        targets.append(is_answer and says and all(marked.values()))
        if is_answer:
            excludes |= not all(marked.values())
        else:
            ignored |= {key for key, yes in marked.items() if yes}
        messages.append({key: part for key, part in message.items() if key not in marked})
    return Messages(messages, targets, excludes, frozenset(f"{name}.{key}" for key in ignored))


def read_tools(value: Any) -> list[Any] | None:
    """Read the column ``tools``: a list of definitions, or its JSON text; None if there are none.

    Raises:
        UserError: it is neither.
    """
    tools = decoded(value)
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [decoded(tool) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("the field 'tools' must be a list of objects, or its JSON text")
    return tools


def with_encoded_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text, as some templates want them."""
    return _with_arguments(messages, lambda given: json.dumps(given, ensure_ascii=False))


def with_arguments(messages: list[Message], arguments: dict[str, Any]) -> list[Message]:
    """The messages with other arguments of all tool calls."""
    return _with_arguments(messages, lambda _: arguments)


def with_text_parts(messages: list[Message]) -> list[Message]:
    """The messages with contents that are lists of one text part, as some templates want them."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _with_arguments(
    messages: list[Message], change: Callable[[dict[str, Any]], Any]
) -> list[Message]:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if not isinstance(function.get("arguments"), dict):
            return call
        return call | {"function": function | {"arguments": change(function["arguments"])}}

    return [
        message | {"tool_calls": [changed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _read_message(given: Any) -> Message:
    if not isinstance(given, dict):
        raise UserError("it must be an object with a role and a content")
    # A null means that the key is not there: templates would print it as the word None.
    message = {key: value for key, value in given.items() if value is not None}
    sender = message.pop("from", message.get("role"))
    if not isinstance(sender, str):
        raise UserError("it must have a role (or 'from'), a string")
    sender = sender.lower()
    message["role"] = ROLES.get(sender, sender)
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if sender in CALLS:
        calls = decoded(message.get("content"))
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        message["content"] = ""
    elif "function_call" in message:  # OpenAI's older form
        message.setdefault("tool_calls", [message.pop("function_call")])
    if not message.get("tool_calls"):  # often an empty list
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = _read_calls(message["tool_calls"])
        message.setdefault("content", "")
    message["content"] = _read_content(message.get("content"))
    return message


def _read_content(content: Any) -> str:
    """The text of a content: a string, or a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError("it must have a content (or 'value'): a string, or a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"its content has a part of type {kind!r}: only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _read_calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, with decoded arguments."""
    calls = decoded(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError("its tool_calls must be a list of objects")
    return [_read_call(call) for call in calls]


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)  # without OpenAI's envelope
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError("each of its tool_calls must have a function with a name")
    function = dict(function)
    for other in ("parameters", "args"):  # other names of the arguments
        if other in function:
            function.setdefault("arguments", function.pop(other))
    arguments = decoded(function.get("arguments") or {})
    if isinstance(arguments, dict):  # else a text that is no JSON object: as it is
        function["arguments"] = arguments
    envelope = call if "function" in call else {}
    return {"type": "function"} | envelope | {"function": function}


def decoded(value: Any) -> Any:
    """What a JSON text says. A text that is no JSON stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _decides(message: Message, key: str) -> bool:
    value = message[key]
    if value not in (0, 1):  # true and false are 1 and 0
        raise UserError(f"its {key} is {value!r}: it must be 0 or 1, false or true")
    return bool(value)
