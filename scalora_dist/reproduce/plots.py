"""Draws the figures. matplotlib is imported only here: no other command needs it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scalora_dist.errors import UserError


def check_matplotlib() -> None:
    """
    Raises:
        UserError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError("scalora reproduce draws with matplotlib: pip install matplotlib")


def _axes(rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _label(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(below, fontsize=7)
    axis.tick_params(labelsize=7)


def draw_figure1(data: dict[str, Any], path: Path) -> None:
    """The four panels of the paper at the first rank; below them the grids, and all ranks."""
    figure, ((loss, rank, cosine, bound), (by_eta, by_step, by_rank, reached)) = _axes(2, 4)
    first, methods = next(iter(data["ranks"].items()))
    ranks = [int(r) for r in data["ranks"]]
    for number, (name, found) in enumerate(methods.items()):
        one, style = found["trace"], {"color": f"C{number}", "lw": 1}
        loss.semilogy(one["loss"], label=name, **style)
        rank.plot(one["rank"], **style)
        cosine.plot(one["cosine"], **style)
        if name in ("LoRA", "ScaLoRA"):
            bound.semilogy(one["loss"], **style)
            bound.semilogy(one["bound"], ls="--", **style)
        by_step.loglog(*_least(found, 0), "o-", ms=2, base=2, **style)
        by_eta.loglog(*_least(found, 1), "o-", ms=2, base=2, **style)
        ends = [data["ranks"][str(r)][name]["trace"] for r in ranks]
        by_rank.loglog(ranks, [end["loss"][-1] for end in ends], "o-", ms=2, base=2, **style)
        reached.semilogx(ranks, [end["rank"][-1] for end in ends], "o-", ms=2, base=2, **style)
    loss.legend(fontsize=7)
    _label(loss, f"(a) loss, r = {first}", "iteration")
    _label(rank, f"(b) rank of W_t − W_0, r = {first}", "iteration")
    _label(cosine, f"(c) cosine with −∇ℓ(W_t), r = {first}", "iteration")
    _label(bound, f"(d) loss, and bound (6) dashed, r = {first}", "iteration")
    _label(by_eta, f"last loss at the best step, r = {first}", "eta_lipschitz")
    _label(by_step, f"last loss at the best eta_lipschitz, r = {first}", "η·L / eta_lipschitz")
    _label(by_rank, "last loss", "r")
    _label(reached, "last rank of W_t − W_0", "r")
    _save(figure, path)


def _least(found: dict[str, Any], which: int) -> tuple[list[float], list[float]]:
    """The least last loss over the other coordinate of the grid, against coordinate ``which``."""
    least: dict[float, float] = {}
    for *powers, last in found["grid"]:
        if last is not None:
            at = 2.0 ** (powers[0] / 2) if which == 0 else 2.0 ** powers[1]
            least[at] = min(last, least.get(at, last))
    return sorted(least), [least[at] for at in sorted(least)]
