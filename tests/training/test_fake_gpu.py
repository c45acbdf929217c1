"""The trainer on a fake GPU: starts, steps, a checkpoint and exports, in one process and on FSDP2.

FSDP2's own forward, backward and reductions run too. DeepSpeed's don't: it picks its own device.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

from scalora_dist.checkpoint.parts import stage
from scalora_dist.modeling import offloaded_activations
from scalora_dist.modeling.offloaded_activations import IN_FLIGHT, StreamedCopies
from scalora_dist.profiling.kernels import Counts, KernelCount
from scalora_dist.training.trainer import Trainer
from tests.support import runs, tiny_runs
from tests.support.tiny_models import save_task
from tools.fake_gpu.device import fake_gpu
from tools.fake_gpu.layers import known_ranges

# Options that a method does not read, or that have other values for it.
OWN: dict[str, dict[str, Any]] = {
    "scalora": {},
    "lora": {},
    "lora-pro": {},
    "relora": {"relora_interval": 1},
    "lora-xs": {},
    "lora-sb": {"lora_alpha": None},
    "mora": {"lora_alpha": None},
    "full": {"rank": None, "lora_alpha": None, "lora_dropout": None},
    "peft-lora": {},
    "dora": {},
    "hira": {"lora_alpha": None},
    "pissa": {},
    "lora-ga": {"rank": 2},
}
DAILY = {("local", "scalora"), ("local", "lora-xs"), ("fsdp", "scalora"), ("fsdp", "pissa")}
# Times that the host waits in a step: never for its micro-batch; for its loss; and for the method,
# which is the gradients' norm where it has no transform.
STEP = 1
METHOD = {"scalora": 2, "lora-pro": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("fake_gpu"))


@pytest.fixture(autouse=True)
def load_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads weights in other threads, in which the GPU is not faked."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


def steps(trainer: Trainer, count: int) -> Counts:
    """Start, and take ``count`` steps of one micro-batch. Returns the counts of the last."""
    trainer.loss.checked = True  # by a value that the GPU does not have
    micro_batches = trainer.start()
    trainer.engine.module.train()
    with KernelCount("cuda") as kernels:
        for step in range(count):
            kernels.take()
            trainer.take_step(step, micro_batches)
    return kernels.take()


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        pytest.param(engine, method, marks=[] if (engine, method) in DAILY else pytest.mark.heavy)
        for engine in ("local", "fsdp")
        for method in OWN
    ],
)
def test_steps(task: Path, tmp_path: Path, engine: str, method: str) -> None:
    rank, size = (0, 1) if engine == "local" else (3, 8)
    given = {"train_batch_size": 3 * size, "eval_size": None, "method": method, **OWN[method]}
    options = tiny_runs.options(task, tmp_path / "run", engine, **given)
    with fake_gpu(rank, size) as world, known_ranges("fsdp" if size > 1 else "local"):
        trainer = runs.make(world, options)
        assert all(p.device.type == "cuda" for p in trainer.model.parameters())
        counts = steps(trainer, 2)
        trainer.close()
    assert counts.total > 0
    assert counts.waits == STEP + METHOD.get(method, 1), counts.synchronisations
    if engine == "fsdp":
        assert counts.collectives["allgather_base"] and counts.collectives["reduce_scatter_base"]


@pytest.mark.parametrize(
    ("engine", "checkpointing"),
    [
        ("fsdp", True),
        pytest.param("fsdp", False, marks=pytest.mark.heavy),
        pytest.param("local", True, marks=pytest.mark.heavy),
        pytest.param("local", False, marks=pytest.mark.heavy),
    ],
)
def test_activations_on_the_host(
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    checkpointing: bool,
) -> None:
    """The host waits for no copy. In the backward it waits if it is too many tensors ahead."""
    copies: Counter[str] = Counter()

    class Counted(StreamedCopies):
        def send(self, tensor: Tensor) -> Any:
            copies["sent"] += 1
            return super().send(tensor)

        def fetch(self, copy: Any) -> Tensor:
            copies["fetched"] += 1
            return super().fetch(copy)

    monkeypatch.setattr(offloaded_activations, "SMALLEST", 0)
    monkeypatch.setattr(offloaded_activations, "AHEAD", 2)
    monkeypatch.setattr(offloaded_activations, "StreamedCopies", Counted)
    rank, size = (0, 1) if engine == "local" else (3, 8)
    given: dict[str, Any] = {"activation_offloading": True, "gradient_checkpointing": checkpointing}
    given |= {"train_batch_size": 3 * size, "eval_size": None}
    options = tiny_runs.options(task, tmp_path / "run", engine, **given)
    with fake_gpu(rank, size) as world, known_ranges("fsdp" if size > 1 else "local"):
        trainer = runs.make(world, options)
        counts = steps(trainer, 1)
        trainer.close()
    assert 2 < copies["fetched"] == copies["sent"] - IN_FLIGHT
    too_far = copies["fetched"] - 2
    assert counts.waits == STEP + METHOD["scalora"] + too_far, counts.synchronisations


@pytest.mark.parametrize("method", ["scalora", pytest.param("lora", marks=pytest.mark.heavy)])
def test_a_whole_run(task: Path, tmp_path: Path, method: str) -> None:
    options = tiny_runs.options(
        task,
        tmp_path / "run",
        "local",
        method=method,
        max_steps=2,
        train_batch_size=3,
        **OWN[method],
    )
    options["save_model"] = True
    with fake_gpu() as world:
        trainer = runs.make(world, options)
        trainer.loss.checked = True
        summary = trainer.run()
    assert summary["steps"] == 2
    assert tiny_runs.sound(tmp_path / "run") == [2]
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.self_attn.q_proj.weight").isfinite().all()
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert adapter.exists() == (method == "lora")


@pytest.mark.parametrize(
    "method",
    [
        {"method": "scalora", "merge_target": "carry"},
        pytest.param({"method": "scalora"}, marks=pytest.mark.heavy),
        pytest.param({"method": "lora"}, marks=pytest.mark.heavy),
    ],
)
def test_staging_and_exports_of_shards(task: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """On rank 0 of 8. The others follow its objects, which a fake group does not send."""
    given = {"train_batch_size": 24, "eval_size": None, "save_model": True, **method}
    options = tiny_runs.options(task, tmp_path / "run", "fsdp", **given)
    with fake_gpu(0, 8) as world, known_ranges("fsdp"):
        trainer = runs.make(world, options)
        trainer.loss.checked = True
        micro_batches = trainer.start()
        trainer.engine.module.train()
        for step in range(2):
            trainer.progress.note(trainer.take_step(step, micro_batches)[0])
        with KernelCount("cuda") as kernels:
            staged = stage(trainer.state.parts())
        # Copies into pinned memory: the host waits for them once, not for each.
        assert kernels.take().waits <= 1
        assert staged and all(part.local.device.type == "cpu" for part in staged.values())
        trainer.runner.finish()
        trainer.results.phases.trained(2, saved=False)
        trainer.results.evaluated(None)
        results, progress = trainer.results, trainer.progress
        results.write(trainer.feed.tokenizer, progress.tally, progress.before, {})
        trainer.close()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"summary.json", "model"}
    merges = method == {"method": "scalora"}
    assert ("adapter" in left) == (not merges)
