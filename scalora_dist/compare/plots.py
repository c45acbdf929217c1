"""Draws a study's results. A method has one colour and marker in all pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scalora_dist.compare.results import CellResult, SetupResult, Table, picture

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*<>hp"
STYLES = ("-", "--", ":", "-.")
SIZE = (7.0, 4.5)  # inches
ABOVE = 1.5  # a loss axis ends at this many times the spread of good losses above the best


class Plots:
    """Draws the pictures of a study into its folder."""

    def __init__(self, labels: Sequence[str], folder: Path) -> None:
        """
        Args:
            labels: names of all methods of the study, in its order.
            folder: where the pictures go.
        """
        self.folder = folder
        self.styles: dict[str, dict[str, Any]] = {
            label: {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": STYLES[i % len(STYLES)],
            }
            for i, label in enumerate(labels)
        }

    def draw(self, setup: SetupResult) -> None:
        """Draw all pictures of a set-up again."""
        for table in setup.tables:
            title = setup.name if table.rank is None else f"{setup.name}, rank {table.rank}"
            self._by_rate(setup, table, title)
            self._by_step(setup, table, title)
        if len(setup.tables) > 1:
            self._by_rank(setup)

    def _by_rate(self, setup: SetupResult, table: Table, title: str) -> None:
        figure, axes = _new(title, "learning rate", "validation loss")
        axes.set_xscale("log")
        shown = []
        for row in table.rows:
            style = self.styles[row.cell.label]
            losses: dict[float, list[float]] = {}
            for each in row.tuning:
                if each["loss"] is not None:
                    losses.setdefault(each["learning_rate"], []).append(each["loss"])
            rates = sorted(losses)
            means = [sum(losses[rate]) / len(losses[rate]) for rate in rates]
            axes.plot(rates, means, **style | {"marker": ""})
            axes.plot([], [], label=row.cell.label, markersize=5, **style)  # for the legend
            points = [(rate, loss) for rate in rates for loss in losses[rate]]
            if points:
                axes.plot(*zip(*points, strict=True), **style | {"linestyle": ""}, markersize=5)
            if row.best_rate in losses:
                axes.plot(
                    row.best_rate,
                    means[rates.index(row.best_rate)],
                    **style | {"markerfacecolor": "none"},
                    markersize=12,
                )
            shown += means
        _end_above(axes, shown)
        self._save(figure, axes, picture("rate", setup.name, table.rank), "large and open: chosen")

    def _by_step(self, setup: SetupResult, table: Table, title: str) -> None:
        figure, axes = _new(title, "step", "training loss (running mean)")
        shown = []
        for row in table.rows:
            if row.curve is None:
                continue
            curve, style = row.curve, self.styles[row.cell.label]
            axes.plot(
                curve.steps,
                curve.mean,
                label=f"{row.cell.label}, {row.best_rate:g}",
                markevery=0.1,
                markersize=5,
                **style,
            )
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(curve.steps, curve.low, curve.high, **band)
            shown += [curve.mean[-1], curve.mean[len(curve.mean) // 10]]
        _end_above(axes, shown)
        note = "bands: lowest and highest seed"
        self._save(figure, axes, picture("step", setup.name, table.rank), note)

    def _by_rank(self, setup: SetupResult) -> None:
        figure, axes = _new(setup.name, "rank", "held-out loss")
        axes.set_xscale("log", base=2)
        rows = list({row.cell: row for table in setup.tables for row in table.rows}.values())
        ranks = [table.rank for table in setup.tables if table.rank is not None]
        for label, style in self.styles.items():
            own = [row for row in rows if row.cell.label == label and row.loss is not None]
            points = [point for row in own for point in _points_of(row, ranks)]
            if points:
                x, y, bar = zip(*points, strict=True)
                axes.errorbar(x, y, yerr=bar, label=label, capsize=3, markersize=6, **style)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        self._save(figure, axes, picture("rank", setup.name), "bars: standard deviation of seeds")

    def _save(self, figure: Figure, axes: Axes, name: str, note: str) -> None:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=note, title_fontsize="small", fontsize="small")
        aside = self.folder / f"{name}.partial"
        figure.savefig(aside, dpi=120, format="png")
        aside.replace(self.folder / name)


def _points_of(row: CellResult, ranks: Sequence[int]) -> list[tuple[float, float, float]]:
    """(rank, loss, sd); at the lowest and the highest rank for a method without ranks."""
    assert row.loss is not None
    at = [row.cell.rank] if row.cell.rank is not None else [min(ranks), max(ranks)]
    return [(float(rank), row.loss["mean"], row.loss["sd"]) for rank in at]


def _new(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _end_above(axes: Axes, losses: Sequence[float]) -> None:
    """Let the axis end a little above the median loss, so that very high ones hide no others."""
    known = sorted(loss for loss in losses if math.isfinite(loss))
    if len(known) < 3:
        return
    least, median = known[0], known[len(known) // 2]
    top = median + ABOVE * (median - least)
    if known[-1] > top > least:
        axes.set_ylim(top=top)
