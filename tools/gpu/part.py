"""The command line of a part that measures in one process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Protocol


class Measure(Protocol):
    def __call__(self, file: Path, *, smoke: bool) -> None:
        """Measure, and write the JSON ``file`` anew after each row.

        Args:
            smoke: whether to take the small form, for a CPU.
        """


def run_part(description: str | None, measure: Measure) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    measure(args.json, smoke=args.smoke)
