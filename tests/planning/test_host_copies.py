"""What a plan says of the bus to the host, and of fetched activations that take device memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaConfig

from scalora_dist.config.parser import parse_options
from scalora_dist.modeling import offloaded_activations
from scalora_dist.modeling.offloaded_activations import AHEAD
from scalora_dist.planning import trace
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.least_times import LeastTimes, least_times_of
from scalora_dist.planning.plan import Plan
from scalora_dist.planning.planner import Planner
from scalora_dist.planning.table import render
from scalora_dist.profiling.gpus import GPUS
from scalora_dist.profiling.live import LiveBytes
from tests.support import tiny_models, tiny_runs
from tests.support.workers.check_plan import measured, planned

# A model whose activations are larger than its logits.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
MERGED = 2 * (4 * 64 * 64 + 3 * 64 * 640)  # elements of all W
heavy = partial(pytest.param, marks=pytest.mark.heavy)
WHERE = PlanArguments(gpus_per_node=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES).save_pretrained(folder)
    return folder


def plan_of(model: Path, *words: str, gpus: int = 2) -> Plan:
    given = ["--model_name_or_path", str(model), "--max_length", "64", "--rank", "4", *words]
    options = parse_options([*given, "--output_dir", "."])
    return Planner(options, WHERE).plan(options, gpus)


def times_of(plan: Plan) -> LeastTimes:
    return least_times_of(plan, WHERE)


class Watched(trace._Uncopied):
    """Remembers the bytes that were sent and fetched, and those that were live at each fetch."""

    given: list[int]
    taken: list[int]
    activations: list[int]

    def __init__(self, live: LiveBytes) -> None:
        super().__init__(live)
        self.before = live.now

    def send(self, tensor: Tensor) -> Any:
        self.given.append(tensor.nbytes)
        return super().send(tensor)

    def fetch(self, copy: Any) -> Tensor:
        tensor = super().fetch(copy)
        self.taken.append(tensor.nbytes)
        self.activations.append(self.live.now - self.before)
        return tensor


def test_offloaded_activations_take_the_bus_and_come_back_ahead_of_their_use(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_Uncopied", Watched)
    monkeypatch.setattr(offloaded_activations, "SMALLEST", 2**12)
    words = ["--activation_offloading", "--per_device_train_batch_size", "8"]
    words += ["--gradient_accumulation_steps", "3"]
    plans, counted = [], []
    for ahead in (0, AHEAD):
        monkeypatch.setattr(trace, "AHEAD", ahead)
        Watched.given, Watched.taken, Watched.activations = [], [], []
        plans.append(plan_of(model, *words, gpus=1))
        sizes = Watched.taken
        last = [sum(sizes[max(0, i - AHEAD) : i + 1]) for i in range(len(sizes))]
        counted.append([x >= y for x, y in zip(Watched.activations, last, strict=True)])
    assert all(counted[1]) and not all(counted[0])
    alone, plan = plans
    assert alone.phases[0] == plan.phases[0]  # the forward fetches nothing
    assert alone.phases[1].total < plan.phases[1].total <= alone.phases[1].total + max(last)
    sent, fetched = sum(Watched.given), sum(sizes)
    assert plan.copied == 3 * (sent + fetched)  # one after the other
    assert 0 < fetched < sent <= plan.held.host["activations"] < 2 * sent
    times = times_of(plan)
    assert times.bus == pytest.approx(plan.copied / 64e9)  # an H100's
    assert times.step >= times.bus
    assert "copies to and from the host" in render(plan, times, WHERE)
    on_a100 = least_times_of(plan, PlanArguments(gpu="a100-80g"))
    assert on_a100.bus == pytest.approx(2 * times.bus)


@pytest.mark.heavy
def test_a_real_step_takes_what_is_planned_with_fetched_activations(
    ranks: Any, tmp_path: Path
) -> None:
    task = tiny_models.save_task(tmp_path, **SIZES | {"vocab_size": 300})
    others: dict[str, Any] = {"max_length": 160, "per_device_train_batch_size": 4}
    others |= {"train_batch_size": None, "lora_dropout": 0.0, "activation_offloading": True}
    options = tiny_runs.options(task, tmp_path / "run", "local", **others)
    (found,) = ranks(1).run(measured, options)
    assert planned(options, 1).peak.total == pytest.approx(found.tracked, rel=0.1)


@pytest.mark.parametrize(
    ("words", "merged"),
    [
        (["--ds_config", "zero3_offload", "--bf16"], 4),
        heavy(["--ds_config", "zero3_offload", "--bf16", "--merge_rounding", "nearest"], 2),
        heavy(["--ds_config", "zero3_offload", "--merge_target", "carry"], 0),
        heavy(["--ds_config", "zero3_offload", "--method", "lora"], 0),
        (["--fsdp", "--fsdp_config", "offload"], 4),
        heavy(["--ds_config", "zero3", "--bf16"], 0),
    ],
)
def test_merges_into_offloaded_weights_take_the_bus(
    model: Path, words: list[str], merged: int
) -> None:
    """Each rank's W and low halves, once: they go up while others come down."""
    plan = plan_of(model, *words)
    assert plan.rescale_copied == pytest.approx(merged * MERGED / 2)
    times = times_of(plan)
    assert times.rescale_bus == pytest.approx(plan.rescale_copied / GPUS[WHERE.gpu].bus)
    assert ("a rescale's copies" in render(plan, times, WHERE)) == bool(merged)


def test_offloaded_weights_go_up_to_be_gathered(model: Path, tmp_path: Path) -> None:
    """A rank's own part of what is gathered, in the dtype of the host's."""

    def own(plan: Plan) -> float:
        (message,) = [m for m in plan.messages if m.what == "gathered weights"]
        return message.received / (message.ranks - 1)

    zero, fsdp = ["--ds_config", "zero3_offload"], ["--fsdp", "--fsdp_config"]
    two = plan_of(model, *zero)
    assert two.copied == pytest.approx(own(two))
    alone = plan_of(model, *zero, gpus=1)  # it receives nothing
    assert alone.copied == pytest.approx(2 * two.copied)
    (tmp_path / "fsdp.yaml").write_text("cpu_offload: true\nmixed_precision: {param_dtype: bf16}\n")
    mixed = plan_of(model, *fsdp, str(tmp_path / "fsdp.yaml"))
    assert mixed.copied == pytest.approx(2 * own(mixed))
