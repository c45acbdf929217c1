"""What identifies a run of a study, and the learning rates of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from scalora_dist.errors import UserError

Part: TypeAlias = Literal["tune", "final"]

# Grids such as 1e-3, 3e-3, 1e-2 count as geometric too: each step may differ by this factor.
UNEVEN = 1.25
LEAST_FACTOR = 1.1


@dataclass(frozen=True)
class Cell:
    """What gets one learning rate: a method at a rank in a set-up.

    Attributes:
        setup: name of the set-up.
        label: name of the method in the study.
        rank: ``--rank``; None for a method that does not read it.
    """

    setup: str
    label: str
    rank: int | None

    def __str__(self) -> str:
        return f"{self.setup}, {self.label}" + ("" if self.rank is None else f", rank {self.rank}")


@dataclass(frozen=True)
class Run:
    """One training. Two runs of a study differ in at least one of these.

    Attributes:
        cell: the method, its rank and the set-up.
        learning_rate: ``--learning_rate``.
        seed: ``--seed``.
        part: "tune": evaluated on validation; "final": evaluated on test.
    """

    cell: Cell
    learning_rate: float
    seed: int
    part: Part

    def __str__(self) -> str:
        return f"{self.cell}, learning rate {self.learning_rate:g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The run's folder, relative to that of all runs. ``repr`` of a float loses no digit."""
        cell = self.cell
        rank = "no-rank" if cell.rank is None else f"r{cell.rank}"
        name = f"{self.part}-lr{self.learning_rate!r}-seed{self.seed}"
        return f"{cell.setup}/{cell.label}/{rank}/{name}"


@dataclass(frozen=True)
class Grid:
    """Geometric learning rates, to be widened by the same factor on both sides.

    Attributes:
        rates: at least two, rising.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: the rates are not geometric.
        """
        rates = self.rates
        if len(rates) < 2 or rates[0] <= 0:
            raise UserError(f"learning_rates {list(rates)}: give at least two positive rates")
        factor = self.factor
        steps = [b / a / factor for a, b in pairwise(rates)]
        if factor < LEAST_FACTOR or not all(1 / UNEVEN <= step <= UNEVEN for step in steps):
            raise UserError(
                f"learning_rates {list(rates)}: give a rising geometric grid, such as 1.0e-3, "
                "3.0e-3, 1.0e-2"
            )

    @property
    def factor(self) -> float:
        """The mean factor between neighbours."""
        return (self.rates[-1] / self.rates[0]) ** (1 / (len(self.rates) - 1))

    def rate(self, position: int) -> float:
        """The rate at a position. 0 is the first rate given; others may lie outside the grid."""
        if 0 <= position < len(self.rates):
            return self.rates[position]
        end = 0 if position < 0 else len(self.rates) - 1
        return float(f"{self.rates[end] * self.factor ** (position - end):.4g}")
