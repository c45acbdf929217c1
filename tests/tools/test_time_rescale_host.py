"""The tool that measures the Python of a rescale, on small layers and few ranks."""

from __future__ import annotations

import pytest

from scalora_dist.planning.ranges import Sharding
from tools import time_rescale_host
from tools.gpu.gemma import text_config


@pytest.mark.parametrize("sharding", ["zero1", "zero3", "fsdp"])
def test_a_small_rescale(sharding: Sharding, monkeypatch: pytest.MonkeyPatch) -> None:
    small = text_config(smoke=True)
    monkeypatch.setattr(time_rescale_host, "text_config", lambda *, smoke: small)
    found = time_rescale_host.measure(sharding, size=8, rank=4, rounds=1)
    assert 0 < found["python"] < found["whole"]
    assert 50 < found["operators"] < 400
