"""What of a chat is a target; see test_stock_templates for those of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.prompts import IGNORE
from scalora_dist.data.tokenize import Tokenized, tokenize_examples
from scalora_dist.errors import UserError

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]


def tokenize(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Tokenized:
    return tokenize_examples(Dataset.from_list(rows), tokenizer, DataArguments(**options))


def shown(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[str]:
    """The text of each example, with each run of targets in [[ ]]."""
    texts = []
    for row in tokenize(rows, tokenizer, **options).dataset:
        text, was_target = "", False
        for i, label in zip(row["input_ids"], row["labels"], strict=True):
            hit = label != IGNORE
            text += ("]]", "[[")[hit] * (hit != was_target) + tokenizer.decode([i])
            was_target = hit
        texts.append(text + "]]" * was_target)
    return texts


def chat(*turns: str, **columns: Any) -> dict[str, Any]:
    """The user and the assistant speak in turn."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"messages": messages} | columns


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
# Writes how many messages there are, so that no rendering is a prefix of a longer one.
COUNTS = "{{ messages | length }}" + PLAIN
TALK = chat("one", "uno", "two", "dos")
WHOLE = "<user>one</s>\n<assistant>[[uno</s>]]\n<user>two</s>\n<assistant>[[dos</s>]]\n"


def test_a_turn_ends_with_its_end_token(make_tokenizer: MakeTokenizer) -> None:
    assert shown([TALK], make_tokenizer(PLAIN + PROMPT)) == [WHOLE]


BLANK = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% else %}A: BEGIN{{ m.content }}</s>END{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_a_prompt_that_ends_in_a_blank_loses_no_token(
    demo_model: str, marks: tuple[str, str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.chat_template = (
        BLANK.replace("BEGIN", marks[0]).replace("END", marks[1]).replace("</s>", "<|im_end|>")
    )
    expected = ["Q: Is it?\nA: [[yes<|im_end|>]]\n"]
    row = chat("Is it?", "yes")
    assert shown([row], tokenizer) == expected
    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    assert shown([pair], tokenizer) == expected
    (found,) = tokenize([row], tokenizer).dataset
    prompt = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, return_dict=False
    )
    assert found["input_ids"][: len(prompt)] == prompt  # as at inference


def test_a_chat_opened_by_the_assistant_trains_on_its_words(make_tokenizer: MakeTokenizer) -> None:
    messages = [{"role": "assistant", "content": "Welcome."}, *chat("Hi", "Yes?")["messages"]]
    default = "{% if messages[0].role != 'system' %}<system>Default</s>\n{% endif %}"
    (text,) = shown([{"messages": messages}], make_tokenizer(default + PLAIN + PROMPT))
    assert text == (
        "<system>Default</s>\n<assistant>[[Welcome.</s>]]\n<user>Hi</s>\n<assistant>[[Yes?</s>]]\n"
    )


@pytest.mark.parametrize("key", ["weight", "train"])
def test_a_turn_of_weight_0_is_context(make_tokenizer: MakeTokenizer, key: str) -> None:
    messages = chat("a", "BAD", "no", "good")["messages"]
    messages[1][key], messages[3][key] = 0, 1
    right = "<user>a</s>\n<assistant>BAD</s>\n<user>no</s>\n<assistant>[[good</s>]]\n"
    rows = [{"messages": messages}]
    assert shown(rows, make_tokenizer(PLAIN + PROMPT)) == [right]
    marked = MARKED.replace("GENERATED", "{{ m.content }}</s>")
    assert shown(rows, make_tokenizer(marked)) == [right]
    assert shown(rows, make_tokenizer(COUNTS + PROMPT), chat_turns="each") == ["3" + right]


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}GENERATED{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_marks_of_the_template_are_the_targets(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(MARKED.replace("GENERATED", "{{ m.content }}"))
    plain = WHOLE.replace("</s>]]", "]]")
    assert shown([TALK], tokenizer) == [plain]
    last = {"prompt": TALK["messages"][:3], "completion": TALK["messages"][3:]}
    assert shown([last], tokenizer) == [plain.replace("[[uno]]", "uno")]


def test_a_template_that_forgets_makes_an_example_of_each_turn(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(COUNTS + PROMPT)
    each = [
        "1<user>one</s>\n<assistant>[[uno</s>]]\n",
        "3" + WHOLE.replace("[[uno</s>]]", "uno</s>"),
    ]
    assert shown([TALK], tokenizer) == each
    found = tokenize([TALK, chat("x", "y")], tokenizer)
    assert found.turns == {"each": 3} and found.dataset["row"][:] == [0, 0, 1]
    with pytest.raises(UserError, match=r"the data set, row 1: .*--chat_turns each"):
        tokenize([TALK], tokenizer, chat_turns="all")


def test_chat_turns_says_which_turns(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(PLAIN + PROMPT)
    first = "<user>one</s>\n<assistant>[[uno</s>]]\n"
    last = WHOLE.replace("[[uno</s>]]", "uno</s>")
    assert shown([TALK], tokenizer, chat_turns="all") == [WHOLE]
    assert shown([TALK], tokenizer, chat_turns="last") == [last]
    assert shown([TALK], tokenizer, chat_turns="each") == [first, last]
    rows = [TALK, chat("x", "y")]
    for turns, counts in ((None, {"all": 2}), ("last", {"last": 2}), ("each", {"each": 3})):
        assert tokenize(rows, tokenizer, chat_turns=turns).turns == counts


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"x": {}}}}]
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}ARGUMENTS{% endfor %}"
CALLING = PLAIN.replace("{{ m.content }}", CALLS + "{{ m.content }}") + PROMPT


@pytest.mark.parametrize("given", ['{"city": "Oslo"}', {"city": "Oslo"}])
@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (
            "{% for k, v in c.function.arguments | items %}({{ k }}={{ v }}){% endfor %}",
            "(city=Oslo)",
        ),
        ("{{ '' + c.function.arguments }}", '{"city": "Oslo"}'),  # only a string can be added
        ("{{ c.function.arguments }}", '{"city": "Oslo"}'),  # would print an object as Python does
        ("{{ c.function.arguments | tojson }}", '{"city": "Oslo"}'),
    ],
)
def test_arguments_of_tools_are_as_the_template_wants_them(
    make_tokenizer: MakeTokenizer, given: Any, reads: str, said: str
) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": given}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    tokenizer = make_tokenizer(CALLING.replace("ARGUMENTS", reads))
    assert shown([{"messages": messages}], tokenizer) == [
        f"<user>time?</s>\n<assistant>[[clock{said}</s>]]\n<tool>12:00</s>\n"
        "<assistant>[[Noon.</s>]]\n"
    ]


def test_a_call_that_the_template_leaves_out_is_refused(make_tokenizer: MakeTokenizer) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [*chat("time?", "Noon.")["messages"]]
    messages[1]["tool_calls"] = [call]
    with pytest.raises(UserError, match="the call of 'clock' in message 2"):
        tokenize([{"messages": messages}], make_tokenizer(PLAIN + PROMPT))


def test_tools_and_template_options_reach_the_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{{ tools | tojson }}{{ mood }}" + PLAIN + PROMPT)
    row = chat("a", "b", tools=TOOLS, chat_template_kwargs={"mood": "sad", "unknown": 1})
    (text,) = shown([row], tokenizer)
    assert text.startswith('[{"type": "function", "function": {"name": "clock"') and "]sad<" in text
    assert tokenize([row], tokenizer).ignored == {"chat_template_kwargs.unknown"}
    given = {"chat_template_kwargs": '{"mood": "glad"}'}
    (text,) = shown([chat("a", "b", tools=TOOLS)], tokenizer, **given)
    assert "]glad<" in text
    assert "]sad<" in shown([row], tokenizer, **given)[0]


def test_what_no_template_reads_is_named(make_tokenizer: MakeTokenizer) -> None:
    row = chat("a", "b", tools=TOOLS, source="web")
    row["messages"][0]["name"] = "Ann"
    row["messages"][1]["reasoning_content"] = "hm"
    found = tokenize([row, chat("x", "y")], make_tokenizer(PLAIN + PROMPT))
    assert found.ignored == {*("tools", "source", "messages.name", "messages.reasoning_content")}
    thinks = PLAIN.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}") + PROMPT
    assert tokenize([row], make_tokenizer(thinks)).ignored == {
        *("tools", "source", "messages.name")
    }


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_whatever_a_template_raises_is_a_sentence(
    make_tokenizer: MakeTokenizer, template: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        tokenize([TALK], make_tokenizer(template))
    message = str(caught.value)
    assert message.startswith("the data set, row 1: ") and reason in message
    assert "\n" not in message


def test_a_chat_needs_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"the data set, row 1: .* no chat template"):
        tokenize([TALK], tokenizer)


def test_a_chat_without_an_answer_has_no_target(make_tokenizer: MakeTokenizer) -> None:
    found = tokenize([TALK, chat("one")], make_tokenizer(PLAIN + PROMPT))
    assert len(found.dataset) == 1 and found.dropped == 1


# Once an answer follows, calls before it lose their thought; each answer has a channel of its own.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and (loop.last or messages[-1].role != 'assistant') %}"
    "<assistant><thought>{{ m.thinking }}</s>{% endif %}"
    "<assistant><final>{{ m.content }}</s>{% else %}<{{ m.role }}>{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_turns_own_header_and_thought_are_targets(make_tokenizer: MakeTokenizer) -> None:
    messages = chat("one", "uno", "two", "dos")["messages"]
    messages[1]["thinking"], messages[3]["thinking"] = "why", "because"
    assert shown([{"messages": messages}], make_tokenizer(CHANNELS)) == [
        "<user>one</s><assistant>[[<thought>why</s><assistant><final>uno</s>]]",
        "<user>one</s><assistant><thought>why</s><assistant><final>uno</s><user>two</s>"
        "<assistant>[[<thought>because</s><assistant><final>dos</s>]]",
    ]


# The generation prompt opens a thought; a rendered turn without one has an empty one.
OPENED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.mark.parametrize("thought", ["<think>X", "<think>\nX", "\n<think>X"])
def test_a_thought_that_the_prompt_opens_is_not_opened_twice(
    make_tokenizer: MakeTokenizer, thought: str
) -> None:
    rows = [chat("one", f"{thought}</think>uno")]
    assert shown(rows, make_tokenizer(OPENED)) == [
        "<user>one</s><assistant><think>\n[[X</think>uno</s>]]"
    ]
    rows = [chat("one", "<think>\n\n</think>\n\nuno")]  # an empty thought keeps its lines
    assert shown(rows, make_tokenizer(OPENED)) == [
        "<user>one</s><assistant><think>\n[[\n</think>\n\nuno</s>]]"
    ]


def test_templates_of_lists_of_parts_get_them(make_tokenizer: MakeTokenizer) -> None:
    parts = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    tokenizer = make_tokenizer(PLAIN.replace("{{ m.content }}", parts) + PROMPT)
    assert shown([TALK], tokenizer) == [WHOLE]
    for short in ("a", "user", "s>"):  # they occur in what the template writes itself
        assert shown([chat("e", short)], tokenizer) == [
            f"<user>e</s>\n<assistant>[[{short}</s>]]\n"
        ]


@pytest.mark.parametrize(
    "change", ["| upper", "| e", ".replace('<thought>hm</thought>', '')", ".split() | join(' ')"]
)
def test_templates_may_change_contents(make_tokenizer: MakeTokenizer, change: str) -> None:
    tokenizer = make_tokenizer(
        PLAIN.replace("{{ m.content }}", f"{{{{ m.content{change} }}}}") + PROMPT
    )
    found = tokenize([chat("one  and", "<thought>hm</thought> uno & uno\n\nuno")], tokenizer)
    assert len(found.dataset) == 1 and not found.ignored


def test_calls_without_words_after_a_thought_that_the_prompt_opens(
    make_tokenizer: MakeTokenizer,
) -> None:
    silent = "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    template = CALLING.replace("ARGUMENTS", "").replace("{{ m.content }}", silent)
    tokenizer = make_tokenizer(
        template.replace("<assistant>{% endif", "<assistant><think>{% endif")
    )
    call = {"type": "function", "function": {"name": "clock"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [{"role": "user", "content": "a"}, turn, {"role": "tool", "content": "b"}, turn]
    first = "<user>a</s>\n<assistant><think>[[clock</s>]]\n"
    assert shown([{"messages": messages}], tokenizer) == [
        first,
        "<user>a</s>\n<assistant>clock</s>\n<tool>b</s>\n<assistant><think>[[clock</s>]]\n",
    ]
    (opened,) = shown([{"messages": [turn, *chat("x", "")["messages"]]}], make_tokenizer(template))
    assert opened.startswith("<assistant>[[clock</s>]]\n<user>x")


def test_calls_that_may_have_no_words_are_probed_without_any(make_tokenizer: MakeTokenizer) -> None:
    """Two calls in a row, and a template that refuses words beside one."""
    strict = "{% if m.tool_calls and m.content %}{{ raise_exception('both') }}{% endif %}"
    template = CALLING.replace("ARGUMENTS", "").replace(
        "{{ m.content }}", strict + "{{ m.content }}"
    )
    tokenizer = make_tokenizer("{{ messages | length }}" + template)
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}
    messages = [{"role": "user", "content": "a"}, turn, turn]
    assert shown([{"messages": messages}], tokenizer) == [
        "1<user>a</s>\n<assistant>[[clock</s>]]\n",
        "2<user>a</s>\n<assistant>clock</s>\n<assistant>[[clock</s>]]\n",
    ]


def test_a_thought_after_a_closed_one_is_left_out(make_tokenizer: MakeTokenizer) -> None:
    closed = PROMPT.replace("<assistant>", "<assistant><think></think>")
    rows = [chat("one", "<think>hm</think>uno")]
    found = tokenize(rows, make_tokenizer(PLAIN + closed))
    assert found.ignored == {"messages.content before </think>"}
    rows.append(chat("one", "A </think> ends it"))  # this one is no thought
    assert shown(rows, make_tokenizer(PLAIN + closed)) == [
        "<user>one</s>\n<assistant><think></think>[[uno</s>]]\n",
        "<user>one</s>\n<assistant><think></think>[[A </think> ends it</s>]]\n",
    ]


def test_marked_words_that_follow_a_tools_answer_are_not_the_next_turns(
    make_tokenizer: MakeTokenizer,
) -> None:
    """The template writes a call's words behind the answer."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}<assistant>"
        "{% generation %}{{ m.content }}</s>{% endgeneration %}{% elif m.role == 'assistant' %}"
        "<assistant>{% generation %}{{ m.tool_calls[0].function.name }}</s>{% endgeneration %}"
        "{% else %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% if m.role == 'tool' %}"
        "{% generation %}{{ messages[loop.index0 - 1].content }}</s>{% endgeneration %}{% endif %}"
        "{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "clock"}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "Let me see", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    (text,) = shown([{"messages": messages}], tokenizer, chat_turns="last")
    assert text.endswith("Let me see</s><assistant>[[Noon.</s>]]") and text.count("[[") == 1


def test_marks_after_a_turn_belong_to_the_last_one(make_tokenizer: MakeTokenizer) -> None:
    """Two answers in a row, and an end of the text that only the last message has."""
    end = "{% if not add_generation_prompt %}{% generation %}END{% endgeneration %}{% endif %}"
    tokenizer = make_tokenizer(MARKED.replace("GENERATED", "{{ m.content }}</s>") + end)
    messages = [*chat("one", "uno")["messages"], {"role": "assistant", "content": "due"}]
    begin = "<user>one</s>\n<assistant>"
    assert shown([{"messages": messages}], tokenizer) == [
        begin + "[[uno</s>]]\n[[END]]",
        begin + "uno</s>\n<assistant>[[due</s>]]\n[[END]]",
    ]


def test_a_mark_does_not_reach_into_the_prompt(make_tokenizer: MakeTokenizer) -> None:
    reaching = MARKED.replace("<{{ m.role }}>", "").replace(
        "{% generation %}", "{% generation %}<{{ m.role }}>"
    )
    tokenizer = make_tokenizer(reaching.replace("GENERATED", "{{ m.content }}</s>"))
    assert shown([chat("one", "uno")], tokenizer) == ["one</s>\n<assistant>[[uno</s>]]\n"]


def test_texts_that_look_like_arguments_change_nothing(make_tokenizer: MakeTokenizer) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo"}}}
    messages = chat("call it with {'city': 'Oslo'}", "now")["messages"]
    messages[1]["tool_calls"] = [call]
    tokenizer = make_tokenizer(CALLING.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}"))
    (text,) = shown([{"messages": messages}], tokenizer)
    assert text.endswith('[[clock{"city": "Oslo"}now</s>]]\n')


def test_contents_that_the_template_leaves_out_are_named(make_tokenizer: MakeTokenizer) -> None:
    silent = "{% if not m.tool_calls and m.role != 'tool' %}{{ m.content }}{% endif %}"
    template = CALLING.replace("ARGUMENTS", "").replace("{{ m.content }}", silent)
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "Let me see", "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": "7"},
        {"role": "assistant", "content": "Noon."},
    ]
    found = tokenize([{"messages": messages}], make_tokenizer(template))
    assert found.ignored == {"messages.content beside tool_calls", "messages.content of role tool"}
    mute = PLAIN.replace("{{ m.content }}", "{{ '' if m.role == 'assistant' else m.content }}")
    with pytest.raises(UserError, match="leaves out the words of message 2"):
        tokenize([TALK], make_tokenizer(mute + PROMPT))


def test_variables_that_would_change_the_rendering_itself_are_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    for name in ("tokenize", "chat_template", "add_generation_prompt"):
        with pytest.raises(UserError, match=f"chat_template_kwargs cannot set '{name}'"):
            tokenize([chat("a", "b", chat_template_kwargs={name: "x"})], make_tokenizer(PLAIN))


def test_an_empty_turn_is_no_target(make_tokenizer: MakeTokenizer) -> None:
    (text,) = shown([chat("one", "", "two", "dos")], make_tokenizer(PLAIN + PROMPT))
    assert text.count("[[") == 1 and text.endswith("[[dos</s>]]\n")


def test_answers_without_an_end_token_are_counted(make_tokenizer: MakeTokenizer) -> None:
    rows = [TALK, chat("a", "b")]
    assert tokenize(rows, make_tokenizer(PLAIN + PROMPT)).endless == 0
    assert tokenize(rows, make_tokenizer(PLAIN.replace("</s>", "") + PROMPT)).endless == 2
    assert tokenize(rows, make_tokenizer(PLAIN + PROMPT), max_length=28).endless == 0  # cut
    tokenizer = make_tokenizer(PLAIN.replace("</s>", "<end>") + PROMPT)
    tokenizer.add_tokens(["<end>"])  # not special, but the template writes it
    assert tokenize(rows, tokenizer).endless == 0
    assert shown(rows[1:], tokenizer) == ["<user>a<end>\n<assistant>[[b<end>]]\n"]


def test_prompts_are_no_targets_where_the_data_says_otherwise(
    make_tokenizer: MakeTokenizer,
) -> None:
    row = chat("a", "b", "c", "d")
    assert shown([row], make_tokenizer(PLAIN + PROMPT), train_on_prompt=True)[0].startswith("[[<us")
    row["messages"][1]["weight"] = 0
    for given in (row, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}):
        with pytest.raises(UserError, match=r"row 1: .*--train_on_prompt cannot be used"):
            tokenize([given], make_tokenizer(PLAIN + PROMPT), train_on_prompt=True)


def test_turns_beyond_max_length_are_dropped(make_tokenizer: MakeTokenizer) -> None:
    rows = [chat(*(f"{i:04}" for i in range(40))), chat("x", "y")]
    whole = tokenize(rows, make_tokenizer(PLAIN + PROMPT), chat_turns="each", max_length=4096)
    found = tokenize(rows, make_tokenizer(PLAIN + PROMPT), chat_turns="each", max_length=100)
    assert len(whole.dataset) == 21 and len(found.dataset) == found.turns["each"] < 21
    assert (len(found.dataset), found.dropped, found.truncated) == (4, 17, 17)
    assert found.dataset["row"][:] == [0, 0, 0, 1]
