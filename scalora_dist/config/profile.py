"""Options of profiling: what is measured in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from scalora_dist.config.option import Group, option
from scalora_dist.errors import UserError


@dataclass(frozen=True)
class ProfileArguments(Group):
    _argument_group_name = "profile"

    profile: bool = option(
        False,
        "Measure seconds, FLOP/s and memory of each part of every step. On CPUs, reading a step's "
        "records takes up to a quarter of the step more, which is not counted.",
        resume="free",
    )
    profile_window: Optional[list[int]] = option(
        None,
        "FIRST LAST: the steps to write traces of; the run's 3rd and 4th by default.",
        resume="free",
    )
    peak_tflops: Optional[float] = option(
        None,
        "Peak of the device in the training's dtype, 1e12 FLOP/s, for MFU; by default the 16-bit "
        "peak of known GPUs.",
        resume="free",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("profile_window", "peak_tflops"):
            if getattr(self, name) is not None and not self.profile:
                raise UserError(f"--{name} says how to --profile: set that too, or leave it out")
        window = self.profile_window
        if window is not None and not (len(window) == 2 and 1 <= window[0] <= window[1]):
            raise UserError(
                f"--profile_window {' '.join(map(str, window))}: set the first and the last step "
                "to trace, 1 ≤ FIRST ≤ LAST"
            )
