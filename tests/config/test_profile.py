"""What is refused of the options on profiling."""

from __future__ import annotations

import pytest

from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

OUTPUT = ["--output_dir", "out"]


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        ("--profile --profile_window 4 3", ["--profile_window 4 3", "FIRST ≤ LAST"]),
        ("--profile --profile_window 0 3", ["--profile_window 0 3", "FIRST ≤ LAST"]),
        ("--profile --profile_window 3", ["--profile_window 3", "the first and the last step"]),
        ("--profile_window 3 4", ["--profile_window", "--profile"]),
        ("--peak_tflops 989", ["--peak_tflops", "--profile"]),
        ("--profile --peak_tflops 0", ["--peak_tflops 0", "positive"]),
    ],
)
def test_what_cannot_be(words: str, hints: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_options([*OUTPUT, *words.split()])
    sentence = one_sentence(error)
    assert all(hint in sentence for hint in hints), sentence


def test_a_window_of_one_step() -> None:
    options = parse_options([*OUTPUT, "--profile", "--profile_window", "3", "3"])
    assert options.profile.profile_window == [3, 3]
