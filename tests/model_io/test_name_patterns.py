"""Patterns of layer names against PEFT's and Python's matches, and a bound on their work."""

from __future__ import annotations

import random
import re

import pytest
from peft.utils.other import get_pattern_key

from scalora_dist.model_io.name_patterns import NamePattern, _One

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "model.language_model.layers.1.mlp.down_proj",
    "model.vision_tower.layers.1.mlp.fc1",
    "q_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        r"self_attn\.q_proj",
        "proj",
        "model.layers.1.self_attn.q_proj",
        "^model.layers.1.self_attn.q_proj",
        "^q_proj$",
        "q_proj|k_proj",
        "(q|k)_proj|lm_head",
        r"layers\.\d+\.self_attn\.[qkv]_proj",
        r"layers\.(?:0|1)\..*proj",
        r".*language_model.*\.mlp\.\w+",
        r"layers\.1?1\..*",
        r"[^.]+_proj",
        r"fc\d",
        "down_proj.",
        "",
    ],
)
def test_names_match_as_in_peft(pattern: str) -> None:
    for name in NAMES:
        # PEFT returns the key that matches, or else the name.
        expected = get_pattern_key([f"({pattern})"], name) != name
        assert NamePattern(pattern).matches(name) == expected, name


def draw(source: random.Random, depth: int) -> str:
    """A random pattern of all that a pattern may have."""
    kind = source.random() if depth else 0.0
    if kind < 0.35:
        one = ["a", "b", "1", "_", ".", r"\.", r"\w", r"\d", "[ab]", "[^a]", "[]a]", "[a-b.]"]
        return source.choice([*one, "^", "$"])
    first, second = draw(source, depth - 1), draw(source, depth - 1)
    if kind < 0.6:
        return first + second
    if kind < 0.75:
        return f"({first}|{second})"
    if kind < 0.8:
        return f"{first}|{second}"
    return f"(?:{first}){source.choice(['*', '+', '?', '*?', '+?', '??'])}"


def test_random_patterns_match_as_in_re() -> None:
    source = random.Random(0)
    matches = 0
    for _ in range(2000):
        pattern = draw(source, 4)
        theirs, ours = re.compile(rf"(.*\.)?({pattern})$"), NamePattern(pattern)
        for _ in range(5):
            name = "".join(source.choices("ab1_.", k=source.randrange(8)))
            expected = theirs.match(name) is not None
            matches += expected
            assert ours.matches(name) == expected, f"{pattern!r} and {name!r}"
    assert 1000 < matches < 9000


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "((((a*)*)*)*)*", "(a|a)*", "a?" * 40 + "a" * 40, ".*" * 40, "(a*)*" * 20],
)
def test_no_character_is_tried_twice_at_one_place(pattern: str) -> None:
    """So the work is in proportion to both lengths, though there are 2ⁿ ways to match."""
    name = "a" * 60
    tried: list[tuple[int, str]] = []
    ours = NamePattern(f"{pattern}!")

    def counted(at: int, step: _One) -> _One:
        def fits(character: str) -> object:
            tried.append((at, character))
            return step.fits(character)

        return _One(fits)

    for at, step in enumerate(ours.program):
        if isinstance(step, _One):
            ours.program[at] = counted(at, step)
    assert not ours.matches(name)
    assert max(tried.count(one) for one in set(tried)) <= len(name)
    assert len(ours.program) <= 3 * (len(pattern) + 1)
    assert NamePattern(pattern).matches(name)


@pytest.mark.parametrize(
    ("pattern", "at"),
    [
        ("a{2}", 2),
        ("a++", 3),
        ("a*+", 3),
        ("*a", 1),
        ("^*", 2),
        ("(*a)", 2),
        ("(a", 3),
        ("a)", 2),
        ("a)|(b", 2),
        ("[a", 1),
        ("a]", 2),
        ("[z-a]", 1),
        (r"(a)\1", 4),
        (r"\b", 1),
        ("a\\", 2),
        ("(?i)a", 2),
        ("(?!a)", 2),
        ("(?P<x>a)", 2),
    ],
)
def test_what_is_not_read_is_named(pattern: str, at: int) -> None:
    with pytest.raises(ValueError, match=f"^cannot read character {at} of the pattern") as error:
        NamePattern(pattern)
    assert repr(pattern) in str(error.value)


def test_long_patterns_are_refused_before_they_are_read() -> None:
    nested = "(" * 330 + "a" + ")*" * 330
    assert 990 < len(nested) < 1000 and NamePattern(nested).matches("aaa")
    with pytest.raises(ValueError, match="longer than 1000 characters"):
        NamePattern(nested * 2)
