"""What is refused of the options on the hub."""

from __future__ import annotations

import pytest

from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

OUTPUT = ["--output_dir", "out"]


@pytest.mark.parametrize("words", ["--hub_model_id me/run", "--hub_private_repo false"])
def test_what_does_nothing_without_an_upload(words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_options([*OUTPUT, *words.split()])
    assert "--push_to_hub" in one_sentence(error)
    assert parse_options([*OUTPUT, *words.split(), "--push_to_hub"]).hub.push_to_hub


def test_a_repository_is_private_unless_asked_otherwise() -> None:
    hub = parse_options([*OUTPUT, "--push_to_hub"]).hub
    assert hub.hub_private_repo and hub.hub_model_id is None
