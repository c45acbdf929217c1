"""Draws the figures."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHED = 10  # steps of the moving mean of figure 2(d)


def _axes(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _label(axis: Axes, title: str, below: str) -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(below, fontsize=7)
    axis.tick_params(labelsize=7)


def draw_figure1(data: dict[str, Any], path: Path) -> None:
    """The four panels of the paper at the first rank; below them the grids, and all ranks."""
    figure, ((loss, rank, cosine, bound), (by_eta, by_step, by_rank, reached)) = _axes(2, 4)
    first, methods = next(iter(data["ranks"].items()))
    ranks = sorted(int(r) for r in data["ranks"])
    for number, (name, found) in enumerate(methods.items()):
        one, style = found["trace"], {"color": f"C{number}", "lw": 1}
        loss.semilogy(one["loss"], label=name, **style)
        rank.plot(one["rank"], **style)
        cosine.plot(one["cosine"], **style)
        if name in ("LoRA", "ScaLoRA"):
            bound.semilogy(one["loss"], **style)
            bound.semilogy(one["bound"], ls="--", **style)
        by_step.loglog(*_least(found, 0), "o-", ms=2, **style)
        by_eta.loglog(*_least(found, 1), "o-", ms=2, **style)
        ends = [data["ranks"][str(r)][name]["trace"] for r in ranks]
        by_rank.loglog(ranks, [end["loss"][-1] for end in ends], "o-", ms=2, **style)
        reached.plot(ranks, [end["rank"][-1] for end in ends], "o-", ms=2, **style)
    for axis in (by_eta, by_step, by_rank, reached):
        axis.set_xscale("log", base=2)
    loss.legend(fontsize=7)
    _label(loss, f"(a) loss, r = {first}", "iteration")
    _label(rank, f"(b) rank of W_t − W_0, r = {first}", "iteration")
    _label(cosine, f"(c) cosine with −∇ℓ(W_t), r = {first}", "iteration")
    _label(bound, f"(d) loss, and bound (6) dashed, r = {first}", "iteration")
    _label(by_eta, f"last loss at the best step, r = {first}", "eta_lipschitz")
    _label(by_step, f"last loss at the best eta_lipschitz, r = {first}", "η·L / eta_lipschitz")
    _label(by_rank, "last loss", "r")
    _label(reached, "last rank of W_t − W_0", "r")
    figure.savefig(path, dpi=80)


def _least(found: dict[str, Any], which: int) -> tuple[list[float], list[float]]:
    """The least last loss over the other coordinate of the grid, against coordinate ``which``."""
    least: dict[float, float] = {}
    for *powers, last in found["grid"]:
        if last is not None:
            at = 2.0 ** (powers[0] / 2) if which == 0 else 2.0 ** powers[1]
            least[at] = min(last, least.get(at, last))
    return sorted(least), [least[at] for at in sorted(least)]


def draw_figure2(data: dict[str, Any], path: Path) -> None:
    """Ranks of ∇ℓ over steps; positive shares over steps for each batch size, and against r."""
    ranks = sorted({run["rank"] for run in data["runs"]})
    batches = sorted({run["batch"] for run in data["runs"]})
    figure, ((gradients, *shares, means),) = _axes(1, 2 + len(batches))
    for rank in ranks:
        gradients.axhline(2 * rank, color="0.7", lw=0.8, ls=":")
    for run in data["runs"]:
        color = f"C{batches.index(run['batch'])}"
        if run["rank"] == ranks[-1]:
            found: dict[int, list[int]] = {}
            for one in run["gradients"]:
                found.setdefault(one["step"], []).append(one["rank"])
            middle = [median(values) for values in found.values()]
            gradients.plot(list(found), middle, color=color, lw=1, label=f"batch {run['batch']}")
            gradients.plot(
                list(found), [min(x) for x in found.values()], color=color, lw=1, ls="--"
            )
        axis = shares[batches.index(run["batch"])]
        positive = [step["positive"] for step in run["shares"]]
        smooth = [mean(positive[max(0, t - SMOOTHED + 1) : t + 1]) for t in range(len(positive))]
        steps = [step["step"] for step in run["shares"]]
        style = {"color": f"C{ranks.index(run['rank'])}", "lw": 1}
        axis.plot(steps, smooth, label=f"r = {run['rank']}", **style)
    for number, batch in enumerate(batches):
        runs = sorted((x for x in data["runs"] if x["batch"] == batch), key=lambda x: x["rank"])
        for key, line in (("positive", "o-"), ("bounded", "o--")):
            later = ([one[key] for one in run["shares"] if one["step"]] for run in runs)
            values = [mean(shown) if shown else math.nan for shown in later]
            means.plot([x["rank"] for x in runs], values, line, ms=2, lw=1, color=f"C{number}")
        _label(
            shares[number], f"(d) layers with z > 0, {SMOOTHED}-step mean, batch {batch}", "step"
        )
    means.set_xscale("log", base=2)
    for axis in (*shares, means):
        axis.set_ylim(-0.03, 1.03)
    gradients.set_yscale("log", base=2)
    gradients.legend(fontsize=7)
    shares[0].legend(fontsize=7)
    _label(gradients, "(c) rank of ∇ℓ: median, least (dashed), 2r (dotted)", "step")
    _label(means, "(d) mean share; in scale_bounds dashed", "r")
    figure.savefig(path, dpi=80)
