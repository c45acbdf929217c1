"""Runs complete trainings on real ranks, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scalora_dist.config.parser import parse_options
from scalora_dist.core.grams import Grams
from scalora_dist.core.scale_solver import Rule, quadratic
from scalora_dist.distributed.world import World
from scalora_dist.methods.scalora import Rescaler
from scalora_dist.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]


def words(options: dict[str, Any]) -> list[str]:
    """Options as the words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]


def make(world: World, options: dict[str, Any], trainer: type[Trainer] = Trainer) -> Trainer:
    """Make the trainer like launch/train.py, on ranks that already run."""
    return trainer(parse_options(words(options)), world)


def run(world: World, options: dict[str, Any]) -> dict[str, Any]:
    return make(world, options).run()


def training_modes(world: World, options: dict[str, Any]) -> list[bool]:
    """Train; for each step, whether all modules of the model were in training mode."""
    seen: list[bool] = []

    class Watched(Trainer):
        def take_step(self, *args: Any) -> Any:
            seen.append(all(module.training for module in self.model.modules()))
            return super().take_step(*args)

    make(world, options, Watched).run()
    return seen


def rules_taken(world: World, options: dict[str, Any]) -> list[dict[str, tuple[str, float]]]:
    """Train; for each step, {layer: (rule, distance of the column solution from a bound)}.

    The distance is that of ``distances``.
    """
    trainer = make(world, options)
    rescaler, seen = trainer.runner.transform, []
    assert isinstance(rescaler, Rescaler)
    solve, bounds = rescaler.solve, rescaler.bounds
    assert bounds is not None

    def note(layers: Any, grams: Grams) -> Any:
        found = solve(layers, grams)
        assert found is not None
        rules = [Rule(code).name.lower() for code in found[0].rule.tolist()]
        names = [layer.name for layer in layers]
        far = distances(grams.sums[0::2], grams.sums[1::2], bounds)
        seen.append(dict(zip(names, zip(rules, far, strict=True), strict=True)))
        return found

    rescaler.solve = note  # type: ignore[method-assign]
    trainer.run()
    return seen


def distances(gram_a: Tensor, gram_b: Tensor, bounds: tuple[float, float]) -> list[float]:
    """For each layer: the relative change of the grams at which z = H⁺λ enters or leaves the box.

    Negative: z is outside. To first order, entry by entry: x = C⁺c moves by at most
    |C⁺|(|c| + |C||x|) times that change. Here x and C are z and H in units in which H has a unit
    diagonal.
    """
    found = []
    H, lam = (part.numpy() for part in quadratic(gram_a, gram_b))
    rank = gram_a.shape[-1] // 2
    for i in range(len(H)):
        squares = np.concatenate([np.diag(gram.numpy())[:rank] for gram in (gram_a[i], gram_b[i])])
        used = np.diag(H[i]) > 0  # a side without a gradient is free
        unit = np.sqrt(np.diag(H[i])[used])
        C, c = H[i][np.ix_(used, used)] / np.outer(unit, unit), lam[i][used] / unit
        lower, upper = (bound**2 * unit / squares[used] for bound in bounds)
        inverse = np.linalg.inv(C)
        x = inverse @ c
        moves = np.abs(inverse) @ (np.abs(c) + np.abs(C) @ np.abs(x))
        found.append(float((np.minimum(x - lower, upper - x) / moves).min()))
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def ds_config(stage: str) -> str:
    return str(REPOSITORY / "ds_configs" / f"{stage}.json")


FSDP_CONFIGS: dict[str, dict[str, Any]] = {
    "fsdp_offload": {"cpu_offload": True},
    "hybrid": {"mesh_shape": [2, 2]},
}


def engine_options(engine: str, folder: Path) -> dict[str, Any]:
    """A run's options for an engine.

    Args:
        engine: "local", a config of ds_configs/ without .json, "fsdp" or a key of FSDP_CONFIGS.
        folder: folder to which an FSDP config may be written.
    """
    if engine == "local":
        return {}
    if engine == "fsdp":
        return {"fsdp": True}
    if engine in FSDP_CONFIGS:
        path = folder / f"{engine}.json"
        path.write_text(json.dumps(FSDP_CONFIGS[engine]))
        return {"fsdp": True, "fsdp_config": path}
    return {"ds_config": ds_config(engine)}
