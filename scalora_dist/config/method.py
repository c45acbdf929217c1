"""Options of the training methods: ranks, scales, merges, restarts, initialization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from scalora_dist.config.fields import check_at_least, check_positive, option
from scalora_dist.errors import UserError

MergeRounding = Literal["split", "nearest"]


@dataclass
class MethodArguments:
    _argument_group_name = "method"

    method: str = option("scalora", "How the model is trained; the README lists the methods.")
    rank: int = option(8, "Columns r of A and B; r × r cores; mora: as many parameters as A and B.")
    lora_alpha: float = option(16.0, "The update is scaled by s = lora_alpha / rank.")
    lora_dropout: float = option(
        0.0, "Dropout before B; functions are preserved in evaluation mode."
    )
    target_modules: list[str] = option(
        ["all-linear"], "Module-name suffixes, or all-linear: every nn.Linear but the LM head."
    )
    scaling_rule: Literal["paper", "scalar", "nnls"] = option(
        "paper",
        "paper: Theorem 5's column scaling where it holds, else Theorem 3's scalar one; "
        "nnls: the optimum under the bounds, always.",
    )
    scaling_interval: str = option(
        "1", "Rescale at steps 0, I, 2I … (ScaLoRA-I); auto: solve at each, merge what has moved."
    )
    auto_threshold: float = option(
        0.1, "scaling_interval auto merges a layer when |ln α| or |ln β| of a column passes this."
    )
    eta_lipschitz: float = option(
        0.5, "The product ηL: smaller means larger columns, and steps as lr/√ηL."
    )
    scale_bounds: list[str] = option(
        ["0.05", "5"], "Normalised column sizes stay between these two; none: the paper's letter."
    )
    merge_target: Optional[Literal["weight", "carry"]] = option(
        None, "Where merges go: into W (dense bases), or a low-rank carry beside it (4-bit ones)."
    )
    carry_rank: Optional[int] = option(
        None, "R, which the carry is compressed to when it is full; by default 8 × rank."
    )
    carry_room: Optional[int] = option(
        None, "Columns of the carry beyond R, rank of them for each merge; by default 4 × rank."
    )
    carry_limit: float = option(
        0.01, "Warn when a layer's carry has lost more than this share of its update."
    )
    merge_rounding: MergeRounding = option(
        "split", "16-bit bases: keep the low halves of merged weights (2 bytes each), or lose them."
    )
    alpha_variant: Literal["I", "II"] = option(
        "I", "lora-alpha: I, α = 256·√r for all layers; II, α = √(3·n·r) for n inputs."
    )
    alpha_multiplier: float = option(1.0, "lora-alpha: multiplies α.")
    lr_ratio: float = option(16.0, "lora-plus: A's learning rate over B's (the paper's B over A).")
    relora_interval: int = option(500, "relora: merge and start anew every so many steps.")
    relora_prune: float = option(
        0.99, "relora: share of m (its smallest) that becomes 0, and v with it."
    )
    relora_warmup_steps: int = option(10, "relora: steps of warm-up after a merge.")
    sb_eta: Literal["paper", "code"] = option(
        "paper",
        "lora-sb: η of the start; paper: the learning rate; code: its authors', "
        "lr / (warmup_ratio × steps of 3 examples).",
    )
    start_samples: Optional[int] = option(
        None, "lora-sb, lora-ga: samples of the first gradient; by default 0.1 %%, at least 25."
    )
    start_memory: int = option(
        64, "lora-sb, lora-ga: MiB of a rank for gradients at the start; more: fewer passes."
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rank", "relora_interval", "start_memory")
        check_at_least(self, 0, "relora_warmup_steps", "relora_prune")
        check_positive(self, "eta_lipschitz", "lora_alpha", "alpha_multiplier", "lr_ratio")
        check_positive(self, "auto_threshold", "carry_limit")
        for name in ("start_samples", "carry_rank", "carry_room"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)
        if self.relora_prune > 1:
            raise UserError(f"--relora_prune {self.relora_prune}: set a share, 0 to 1")
        self.interval  # noqa: B018 - raises where the option cannot be read
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: set a number in [0, 1)")
        self.bounds  # noqa: B018 - raises where the option cannot be read

    @property
    def name(self) -> str:
        """Name of the method in the registry."""
        return self.method

    @property
    def interval(self) -> int | None:
        """``scaling_interval`` as a number of steps; None: auto."""
        if self.scaling_interval == "auto":
            return None
        if not str(self.scaling_interval).isdecimal() or int(self.scaling_interval) < 1:
            raise UserError(
                f"--scaling_interval {self.scaling_interval}: set a number of steps, or auto"
            )
        return int(self.scaling_interval)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """``scale_bounds`` as (lo, hi), or None."""
        if [str(bound).lower() for bound in self.scale_bounds] == ["none"]:
            return None
        try:
            low, high = (float(bound) for bound in self.scale_bounds)
        except ValueError:
            low = high = 0.0
        if not 0 < low <= 1 <= high < float("inf"):
            raise UserError(
                f"--scale_bounds {' '.join(map(str, self.scale_bounds))}: "
                "set two numbers 0 < lo ≤ 1 ≤ hi, or none"
            )
        return low, high
