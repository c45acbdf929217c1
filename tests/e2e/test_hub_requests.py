"""Which ranks ask a hub, and for what: the first rank of each node, and no other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.distributed.world import World
from tests.support import hub, launched, runs, tiny_models, tiny_runs
from tests.support.hub import StandIn
from tests.support.ranks import Ranks, free_port

GetRanks = Callable[[int], Ranks]
ENGINES = ["fsdp", pytest.param("zero2", marks=pytest.mark.heavy)]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def hubs() -> Iterator[list[StandIn]]:
    """A hub for each of two ranks, so that each one's requests are known."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(StandIn()) for _ in range(2)]


@pytest.fixture
def case(task: Path, tmp_path: Path, ranks: GetRanks, hubs: list[StandIn]) -> dict[str, Any]:
    """Options of a run whose model, with a chat template, and adapter are on the hubs."""
    model = tmp_path / "model"
    shutil.copytree(task, model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "generation_config.json").write_text('{"max_length": 9}')
    common: dict[str, Any] = {"method": "lora", "max_steps": 2, "lora_dropout": 0.0}
    ranks(1).run(runs.run, tiny_runs.options(task, tmp_path / "adapter", "local", **common))
    for each in hubs:
        each.add("me/base", ("main", model))
        each.add("me/adapter", ("main", tmp_path / "adapter" / "adapter"))
    common |= {"model_name_or_path": "me/base", "adapter_name_or_path": "me/adapter"}
    return tiny_runs.options(task, tmp_path / "run", "local", save_model=True, **common)


def train(
    world: World, environments: list[dict[str, str]], case: dict[str, Any], *, nodes: int
) -> None:
    """Train on two ranks of one node or of two, each with its own hub."""
    local_rank = world.rank if nodes == 1 else 0
    # As `cli.train` sets it before the libraries are imported.
    offline = {"HF_HUB_OFFLINE": "1" if local_rank else "0"}
    with hub.used(environments[world.rank] | offline):
        runs.make(replace(world, local_rank=local_rank, nodes=nodes), case).run()


def files(stand_in: StandIn) -> set[str]:
    """Names of the files that were downloaded."""
    found = (request.partition("/resolve/")[2] for request in stand_in.asked)
    return {name.partition("/")[2] for name in found if name} & {
        file for repository in stand_in.repositories.values() for file in repository.files()
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_the_second_rank_of_a_node_asks_nothing(
    ranks: GetRanks, case: dict[str, Any], tmp_path: Path, hubs: list[StandIn], engine: str
) -> None:
    environments = [each.environment(tmp_path / "cache") for each in hubs]
    case |= runs.engine_options(engine, tmp_path)
    ranks(2).run(train, environments, case, nodes=1)
    wanted = {"config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja"}
    wanted |= {"adapter_model.safetensors", "generation_config.json"}
    assert wanted <= files(hubs[0]) and hubs[1].asked == []


@pytest.mark.parametrize("engine", ENGINES)
def test_each_node_asks_once_and_for_the_same_commit(
    ranks: GetRanks, case: dict[str, Any], tmp_path: Path, hubs: list[StandIn], engine: str
) -> None:
    """Weights are only asked for where ranks read them. The second node sees a newer model."""
    commits = {}
    for name, newer in hubs[1].repositories.items():
        commits[name] = newer.branches["main"]
        newer.commit("main", {"config.json": b"{}", "adapter_config.json": b"{}"})
    environments = [each.environment(tmp_path / f"cache-{i}") for i, each in enumerate(hubs)]
    case |= runs.engine_options(engine, tmp_path)
    ranks(2).run(train, environments, case, nodes=2)
    assert WEIGHTS in files(hubs[0])
    assert (WEIGHTS in files(hubs[1])) == (engine != "fsdp")
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= files(hubs[1])
    for name, commit in commits.items():
        asked = [request for request in hubs[1].asked if f"/{name}/resolve/" in request]
        assert asked and all(f"/{commit}/" in request for request in asked)


def test_what_a_run_records_is_the_name_that_the_user_gave(
    ranks: GetRanks, case: dict[str, Any], tmp_path: Path, hubs: list[StandIn]
) -> None:
    """No path of a cache, and no commit."""
    case["save_steps"] = 1
    ranks(2).run(
        train,
        [each.environment(tmp_path / "cache") for each in hubs],
        case | runs.engine_options("fsdp", tmp_path),
        nodes=1,
    )
    run, commit = tmp_path / "run", hubs[0].repositories["me/base"].branches["main"]
    state = json.loads((run / "checkpoint-2" / "state.json").read_text())
    assert state["options"]["model"]["model_name_or_path"] == "me/base"
    assert state["options"]["model"]["model_revision"] is None
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    written = [path for path in run.rglob("*") if path.suffix in (".json", ".md", ".yaml")]
    for path in written:
        text = path.read_text()
        assert commit not in text and str(tmp_path / "cache") not in text, path


@pytest.mark.heavy
def test_a_launched_rank_is_offline_from_its_start(
    case: dict[str, Any], tmp_path: Path, hubs: list[StandIn]
) -> None:
    """Also for what the libraries ask for on their own."""
    case |= runs.engine_options("fsdp", tmp_path)
    port, processes = free_port(), []
    for rank, each in enumerate(hubs):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        given |= {"MASTER_PORT": port}
        environment = os.environ | launched.ENVIRONMENT | each.environment(tmp_path / "cache")
        del environment["HF_HUB_OFFLINE"]  # as a user's, who has not set it
        command = [sys.executable, "-m", "scalora_dist", "train", *runs.words(case)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment
                | {"MASTER_ADDR": "127.0.0.1"}
                | {name: str(value) for name, value in given.items()},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ends = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert WEIGHTS in files(hubs[0]) and hubs[1].asked == []
