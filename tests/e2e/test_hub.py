"""Base models from a hub, and results to a hub. The hub is a stand-in on this machine."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import dynamic_module_utils

from scalora_dist.config.parser import parse_options
from scalora_dist.distributed.stop_signals import PREEMPTED
from scalora_dist.distributed.world import World
from scalora_dist.errors import Preempted, UserError
from scalora_dist.methods.registry import METHODS
from scalora_dist.model_io.hub import HubError, _errors_told
from scalora_dist.modeling.load import load_model, read_base_model
from scalora_dist.training.phases import FILE
from scalora_dist.training.upload import upload
from tests.support import hub, launched, runs, tiny_models, tiny_runs
from tests.support.hub import StandIn
from tests.support.launched import Launched
from tests.support.ranks import Ranks
from tests.support.refusals import one_sentence

GetRanks = Callable[[int], Ranks]
Environment = dict[str, str]

STEPS = 2
COMMIT = "POST /api/models/me/run/commit/main"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as made:
        yield made


def options(task: Path, folder: Path, **others: Any) -> dict[str, Any]:
    return tiny_runs.options(
        task, folder, "local", **{"max_steps": STEPS, "save_model": True, **others}
    )


def pushing(task: Path, folder: Path, **others: Any) -> dict[str, Any]:
    return options(task, folder, push_to_hub=True, hub_model_id="run", **others)


# Functions for ranks that already run.


def train(
    world: World, environment: Environment, case: dict[str, Any]
) -> tuple[int, dict[str, Any], list[str]]:
    """As ``tiny_runs.train``."""
    with hub.used(environment):
        return tiny_runs.train(world, case)


def refusal(
    world: World, environment: Environment, case: dict[str, Any]
) -> tuple[str, int, list[str]]:
    """As ``tiny_runs.refusal``."""
    with hub.used(environment):
        return tiny_runs.refusal(world, case)


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found
    return found


def phase(folder: Path) -> Any:
    return json.loads((folder / FILE).read_text())["finished"]


# --- to the hub ----------------------------------------------------------------------------------


@pytest.mark.parametrize("save_model", [True, False])
def test_the_results_arrive_in_a_private_repository(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn, save_model: bool
) -> None:
    """The model, or without it the adapter; a second start uploads nothing."""
    folder, environment = tmp_path / "run", stand_in.environment(tmp_path)
    case = options(task, folder, push_to_hub=True, method="lora", save_model=save_model)
    case["resume_from_checkpoint"] = "latest"
    ((_, _, warnings),) = ranks(1).run(train, environment, case)
    assert not warnings
    (repository,) = (made for name, made in stand_in.repositories.items() if name == "me/run")
    assert repository.private
    sent = contents(folder / ("model" if save_model else "adapter"))
    assert repository.files() == sent | {".gitattributes": b""}
    assert repository.messages[1:] == ["Train with scalora (lora)"]
    assert phase(folder) == "upload"
    ranks(1).run(train, environment, case)
    assert len(repository.commits) == 2 and stand_in.asked.count(COMMIT) == 1
    # Also if the results of a finished run are wanted elsewhere.
    ranks(1).run(train, environment, case | {"hub_model_id": "copy"})
    assert stand_in.repositories["me/copy"].files() == repository.files()


@pytest.mark.parametrize(
    ("token", "name", "reason"),
    [
        (None, "run", "there is no token: set HF_TOKEN, or run `hf auth login`"),
        ("hf_expired", "run", "401"),
        ("hf_dam\x01aged", "run", ""),
        ("hf_of_me", "another/run", "403"),
        ("hf_of_me", "another/public", "403"),
        ("hf_of_me", "no=name", "--hub_model_id"),
    ],
)
def test_without_rights_nothing_is_trained(
    ranks: GetRanks,
    task: Path,
    tmp_path: Path,
    stand_in: StandIn,
    token: str | None,
    name: str,
    reason: str,
) -> None:
    stand_in.add("another/public")
    case = pushing(task, tmp_path / "run") | {"hub_model_id": name}
    ((message, status, _),) = ranks(1).run(refusal, stand_in.environment(tmp_path, token), case)
    assert message.startswith("--push_to_hub ") and name in message and reason in message
    assert "\n" not in message and "hf_" not in message
    assert status == 2
    assert not (tmp_path / "run").exists()
    assert [*stand_in.repositories] == ["another/public"]


@pytest.mark.parametrize("url", ["offline", "http://127.0.0.1:9"])
def test_a_hub_that_is_not_reached(ranks: GetRanks, task: Path, tmp_path: Path, url: str) -> None:
    case = pushing(task, tmp_path / "run")
    with StandIn() as stand_in:
        environment = stand_in.environment(tmp_path)
        if url == "offline":
            environment["HF_HUB_OFFLINE"] = "1"
        else:
            environment["HF_ENDPOINT"] = url
        ((message, *_),) = ranks(1).run(refusal, environment, case)
    assert ("HF_HUB_OFFLINE" if url == "offline" else "refused") in message
    assert "\n" not in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("closed", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_a_failed_upload_is_repeated_alone(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn, closed: bool
) -> None:
    folder, environment = tmp_path / "run", stand_in.environment(tmp_path)
    case = pushing(task, folder)
    stand_in.fails = lambda request: (0 if closed else 500) if request == COMMIT else None
    ((message, status, _),) = ranks(1).run(refusal, environment, case)
    assert "\n" not in message and status == 2
    assert f"{folder / 'model'} is whole, but could not be uploaded" in message
    assert "the same command with --resume_from_checkpoint latest" in message
    assert f"`hf upload me/run {folder}/model . --private`" in message
    assert phase(folder) == "summary"
    before = tiny_runs.left(folder)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("model/*")}
    assert before[0][-1]["step"] == STEPS and written
    assert [*stand_in.repositories["me/run"].files()] == [".gitattributes"]

    resumed = case | {"resume_from_checkpoint": "latest"}
    assert ranks(1).run(refusal, environment, resumed)[0][0] == message  # it fails again
    stand_in.fails = lambda request: None
    ((first_step, _, warnings),) = ranks(1).run(train, environment, resumed)
    assert first_step == STEPS and not warnings
    assert tiny_runs.left(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.glob("model/*")} == written
    sent = contents(folder / "model")
    assert stand_in.repositories["me/run"].files() == sent | {".gitattributes": b""}
    assert phase(folder) == "upload"


def test_a_public_repository_is_told(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    """And used, since it is the user's. Nobody is told who wants a public one."""
    repository, environment = stand_in.add("me/run"), stand_in.environment(tmp_path)
    ((_, _, warnings),) = ranks(1).run(train, environment, pushing(task, tmp_path / "run"))
    (warning,) = warnings
    assert "me/run exists on the hub and is public" in warning
    assert contents(tmp_path / "run" / "model").items() <= repository.files().items()
    case = pushing(task, tmp_path / "open", hub_private_repo=False)
    case["hub_model_id"] = "open"
    ((_, _, warnings),) = ranks(1).run(train, environment, case)
    assert not warnings and not stand_in.repositories["me/open"].private


def test_a_run_that_leaves_nothing_to_upload_is_refused(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    case = pushing(task, tmp_path / "run", save_model=False)  # scalora merges into W
    ((message, *_),) = ranks(1).run(refusal, stand_in.environment(tmp_path), case)
    assert "has nothing to upload" in message and "\n" not in message
    assert not stand_in.asked


@pytest.mark.parametrize("there", ["adapter_config.json", "config.json"])
def test_a_model_and_an_adapter_are_not_mixed(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn, there: str
) -> None:
    """transformers would load the adapter's base, not the model."""
    stand_in.add("me/run", private=True).commit("main", {there: b"{}"})
    adapter = there == "config.json"
    case = pushing(task, tmp_path / "run", method="lora", save_model=not adapter)
    ((message, *_),) = ranks(1).run(refusal, stand_in.environment(tmp_path), case)
    assert ("holds a model" if adapter else "holds an adapter") in message and "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused_leaves_no_adapter(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn, method: str
) -> None:
    """A method is refused exactly if its run ends without ``adapter/``."""
    reads = parse_options(["--output_dir", "run", "--method", method]).method.reads
    given: dict[str, Any] = {"method": method, "save_model": False}
    sizes = {"rank": 3, "lora_alpha": 8, "lora_dropout": 0.1}  # LoRA-GA doubles the rank
    given |= {name: size if reads(name) else None for name, size in sizes.items()}
    ranks(1).run(tiny_runs.train, options(task, tmp_path / "alone", **given))
    case, environment = pushing(task, tmp_path / "run", **given), stand_in.environment(tmp_path)
    if (tmp_path / "alone" / "adapter").exists():
        ranks(1).run(train, environment, case)
    else:
        assert "nothing to upload" in ranks(1).run(refusal, environment, case)[0][0]


def test_all_ranks_end_where_the_upload_fails(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    """Although rank 0 alone uploads."""
    folder = tmp_path / "run"
    case = pushing(task, folder) | runs.engine_options("fsdp", tmp_path)
    stand_in.fails = lambda request: 500 if request == COMMIT else None
    answers = ranks(2).run(refusal, stand_in.environment(tmp_path), case)
    assert answers[0][0] == answers[1][0] and "is whole, but could not be" in answers[0][0]
    assert stand_in.asked.count(COMMIT) == 1
    stand_in.fails = lambda request: None
    resumed = case | {"resume_from_checkpoint": "latest"}
    ranks(2).run(train, stand_in.environment(tmp_path), resumed)
    assert contents(folder / "model").items() <= stand_in.repositories["me/run"].files().items()


def test_what_is_told_of_a_run_that_cannot_be_resumed(
    task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    """Where nodes have separate folders, a run has no checkpoint of its last step."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    stand_in.add("me/run", private=True)
    stand_in.fails = lambda request: 500 if request == COMMIT else None
    parsed = parse_options(runs.words(pushing(task, tmp_path)))
    with hub.used(stand_in.environment(tmp_path)), pytest.raises(UserError) as error:
        upload(tmp_path, "me/run", parsed, resumable=False)
    message = one_sentence(error)
    assert "resume" not in message
    assert message.endswith(f"upload it with `hf upload me/run {tmp_path}/model . --private`")


def test_no_secret_is_told() -> None:
    """Addresses of a storage are signed, and a header that cannot be sent is quoted."""
    signed = "Client error '403 Forbidden' for url 'https://s3.org/a/b?Signature=secret&x=1'"
    for error in (ValueError(signed), ValueError("Illegal header value b'Bearer secret\\x01'")):
        with pytest.raises(HubError) as told, _errors_told():
            raise error
        assert "secret" not in str(told.value) and str(told.value).startswith("ValueError: ")


@pytest.mark.heavy
def test_a_launched_run_that_is_stopped_while_it_uploads(
    task: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the hub fails through all retries of huggingface_hub, then it hangs."""
    for name, value in stand_in.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    case = pushing(task, folder, resume_from_checkpoint="latest")
    stand_in.fails = lambda request: 500 if "/info/lfs/" in request else None
    with Launched("local", case, tmp_path / "log") as run:
        assert run.wait() == 2, run.text()
    text = run.text()
    assert "could not be uploaded" in text.splitlines()[-1] and "Traceback" not in text
    assert os.environ["HF_TOKEN"] not in text and "HTTP Request" not in text
    assert sum("/info/lfs/" in request for request in stand_in.asked) == 6
    before = tiny_runs.left(folder)

    hangs, asked = threading.Event(), threading.Event()

    def hang(request: str) -> int | None:
        if request == COMMIT:
            asked.set()
            hangs.wait(60)
        return None

    stand_in.fails = hang
    with Launched("local", case, tmp_path / "log") as run:
        assert run.wait_for(asked.is_set), run.text()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == Preempted.status, run.text()
        hangs.set()
    assert (folder / PREEMPTED).exists()
    with Launched("local", case, tmp_path / "log") as run:
        assert run.wait() == 0, run.text()
    assert tiny_runs.left(folder) == before and not (folder / PREEMPTED).exists()
    assert launched.last_step(folder) == STEPS
    assert contents(folder / "model").items() <= stand_in.repositories["me/run"].files().items()


# --- from the hub --------------------------------------------------------------------------------


def save_other(folder: Path) -> Path:
    """A model as the task's, with other weights."""
    tiny_models.save_odd_model(folder, "llama", initializer_range=0.1)
    return folder


@pytest.mark.parametrize(
    "engine",
    ["local", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("zero3", "fsdp"))],
)
def test_a_model_is_trained_at_its_revision(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn, engine: str
) -> None:
    """Two revisions hold other weights. A private model is read with the token."""
    other = save_other(tmp_path / "other")
    repository = stand_in.add("me/base", ("main", other), ("v1", task), private=True)
    environment = stand_in.environment(tmp_path)
    size, losses = (1 if engine == "local" else 2), {}
    common = runs.engine_options(engine, tmp_path) | {"save_model": False}
    for model in (task, other):
        case = options(task, tmp_path / "alone" / model.name, **common)
        case["model_name_or_path"] = model
        ranks(size).run(tiny_runs.train, case)
        losses[model] = runs.losses(tmp_path / "alone" / model.name)
    assert losses[task] != losses[other]
    revisions = {"v1": task, repository.branches["v1"]: task, None: other}
    for i, (revision, model) in enumerate(revisions.items()):
        case = options(task, tmp_path / f"run-{i}", **common, model_revision=revision)
        case["model_name_or_path"] = "me/base"
        ranks(size).run(train, environment, case)
        assert runs.losses(tmp_path / f"run-{i}") == losses[model]


def test_a_revision_that_is_not_there(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    stand_in.add("me/base", ("main", task))
    environment = stand_in.environment(tmp_path)
    case = options(task, tmp_path / "run", model_revision="v2")
    ((message, *_),) = ranks(1).run(refusal, environment, case)
    assert f"--model_name_or_path {task} is a folder: leave it out" in message
    case["model_name_or_path"] = "me/base"
    ((message, *_),) = ranks(1).run(refusal, environment, case)
    assert message.startswith("--model_name_or_path me/base (revision v2) cannot be loaded: ")
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_resume_at_another_revision_is_refused(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    stand_in.add("me/base", ("main", task), ("v1", task))
    environment = stand_in.environment(tmp_path)
    case = options(task, tmp_path / "run", save_model=False) | {"model_name_or_path": "me/base"}
    ranks(1).run(train, environment, case)
    case |= {"resume_from_checkpoint": "latest", "model_revision": "v1"}
    assert "model_revision" in ranks(1).run(refusal, environment, case)[0][0]


OWN_CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-of-a-test"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    revision = "{}"
"""


def own_code(
    world: World, environment: Environment, words: list[str], modules: Path, *, weights: bool
) -> str:
    """Load a model that has its own code. Returns of which revision the code is."""
    args = parse_options(words).model
    with hub.used(environment), patch.object(dynamic_module_utils, "HF_MODULES_CACHE", modules):
        base = read_base_model(args, torch.float32, world.device)
        model = load_model(args, base, torch.float32, weights=weights)
    return type(model).revision


@pytest.mark.parametrize("weights", [False, True])
def test_a_models_own_code_is_of_the_revision(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn, weights: bool
) -> None:
    """Also where only the config is read, from which a model is built without weights."""
    repository = stand_in.add("me/own", ("main", task))
    config = json.loads((task / "config.json").read_text()) | {"model_type": "own-of-a-test"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    for branch in ("v1", "main"):
        files = repository.files() | {"config.json": json.dumps(config).encode()}
        repository.commit(branch, files | {"own.py": OWN_CODE.format(branch).encode()})
    words = ["--output_dir", "run", "--model_name_or_path", "me/own", "--trust_remote_code"]
    environment, modules = stand_in.environment(tmp_path), tmp_path / "modules"
    for revision in ("v1", "main"):
        given = [*words, "--model_revision", revision]
        assert ranks(1).run(own_code, environment, given, modules, weights=weights) == [revision]


@pytest.mark.heavy
def test_a_hub_that_closes_the_connection(
    ranks: GetRanks, task: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    stand_in.add("me/base", ("main", task))
    stand_in.fails = lambda request: 0 if request.startswith("GET /me/base/resolve") else None
    case = options(task, tmp_path / "run") | {"model_name_or_path": "me/base"}
    ((message, *_),) = ranks(1).run(refusal, stand_in.environment(tmp_path), case)
    commit = stand_in.repositories["me/base"].branches["main"]
    assert message.startswith(
        f"--model_name_or_path me/base (revision {commit}) cannot be loaded: "
    )
