"""Options of the training methods: ranks, scales, merges, restarts, initialization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, TypeAlias, get_args

from scalora_dist.config.option import Group, declaration_of, declarations, default_of, option
from scalora_dist.errors import UserError

MergeRounding: TypeAlias = Literal["split", "nearest"]
MethodName: TypeAlias = Literal[
    "scalora",
    "lora",
    "rslora",
    "lora-alpha",
    "lora-plus",
    "lora-pro",
    "relora",
    "lora-xs",
    "lora-sb",
    "mora",
    "full",
    "peft-lora",
    "dora",
    "hira",
    "pissa",
    "lora-ga",
]

# Which methods read an option.
ADAPTED = frozenset(get_args(MethodName)) - {"full"}
WITH_ALPHA = ADAPTED - {"lora-alpha", "lora-sb", "mora", "hira"}
MERGING = frozenset({"scalora", "relora"})
SAMPLING = frozenset({"lora-sb", "lora-ga"})
SCALORA = frozenset({"scalora"})
LORA_ALPHA = frozenset({"lora-alpha"})
RELORA = frozenset({"relora"})


@dataclass(frozen=True)
class MethodArguments(Group):
    _argument_group_name = "method"

    method: MethodName = option(
        "scalora", "How the model is trained; docs/methods.md explains each.", resume="fixed"
    )
    rank: int = option(
        8,
        "Columns r of A and B; r × r cores; mora: as many parameters as A and B.",
        resume="fixed",
        methods=ADAPTED,
        at_least=1,
    )
    lora_alpha: float = option(
        16.0,
        "The update is scaled by s = lora_alpha / rank.",
        resume="fixed",
        methods=WITH_ALPHA,
        above=0,
    )
    lora_dropout: float = option(
        0.0,
        "Dropout before B; functions are preserved in evaluation mode.",
        resume="warned",
        methods=ADAPTED,
        at_least=0,
        below=1,
    )
    target_modules: list[str] = option(
        ["all-linear"],
        "Module-name suffixes, or all-linear: every nn.Linear but the LM head.",
        resume="fixed",
        methods=ADAPTED,
    )
    scaling_rule: Literal["paper", "scalar", "nnls"] = option(
        "paper",
        "paper: Theorem 5's column scaling where it holds, else Theorem 3's scalar one; "
        "nnls: the optimum under the bounds, always.",
        resume="warned",
        methods=SCALORA,
    )
    scaling_interval: str = option(
        "1",
        "Rescale at steps 0, I, 2I … (ScaLoRA-I); auto: solve at each, merge what has moved.",
        resume="warned",
        methods=SCALORA,
    )
    auto_threshold: float = option(
        0.1,
        "scaling_interval auto merges a layer when |ln α| or |ln β| of a column passes this.",
        resume="warned",
        methods=SCALORA,
        above=0,
    )
    eta_lipschitz: float = option(
        0.5,
        "The product ηL: smaller means larger columns, and steps as lr/√ηL.",
        resume="warned",
        methods=SCALORA,
        above=0,
    )
    scale_bounds: list[str] = option(
        ["0.05", "5"],
        "Normalised column sizes stay between these two; none: the paper's letter.",
        resume="warned",
        methods=SCALORA,
    )
    merge_target: Optional[Literal["weight", "carry"]] = option(
        None,
        "Where merges go: into W (dense bases), or a low-rank carry beside it (4-bit ones).",
        resume="fixed",
        methods=MERGING,
    )
    carry_rank: Optional[int] = option(
        None,
        "R, which the carry is compressed to when it is full; by default 8 × rank.",
        resume="fixed",
        methods=MERGING,
        at_least=1,
    )
    carry_room: Optional[int] = option(
        None,
        "Columns of the carry beyond R, rank of them for each merge; by default 4 × rank.",
        resume="fixed",
        methods=MERGING,
        at_least=1,
    )
    carry_limit: float = option(
        0.01,
        "Warn when a layer's carry has lost more than this share of its update.",
        resume="warned",
        methods=MERGING,
        above=0,
    )
    merge_rounding: MergeRounding = option(
        "split",
        "16-bit bases: keep the low halves of merged weights (2 bytes each), or lose them.",
        resume="fixed",
        methods=MERGING,
    )
    alpha_variant: Literal["I", "II"] = option(
        "I",
        "I: α = 256·√r for all layers; II: α = √(3·n·r) for n inputs.",
        resume="fixed",
        methods=LORA_ALPHA,
    )
    alpha_multiplier: float = option(
        1.0, "Multiplies α.", resume="fixed", methods=LORA_ALPHA, above=0
    )
    lr_ratio: float = option(
        16.0,
        "A's learning rate over B's (the paper's B over A).",
        resume="warned",
        methods=frozenset({"lora-plus"}),
        above=0,
    )
    relora_interval: int = option(
        500, "Merge and start anew every so many steps.", resume="fixed", methods=RELORA, at_least=1
    )
    relora_prune: float = option(
        0.99,
        "Share of m (its smallest) that becomes 0 after a merge, and v with it.",
        resume="warned",
        methods=RELORA,
        at_least=0,
        at_most=1,
    )
    relora_warmup_steps: int = option(
        10, "Steps of warm-up after a merge.", resume="warned", methods=RELORA, at_least=0
    )
    sb_eta: Literal["paper", "code"] = option(
        "paper",
        "η of the start; paper: the learning rate; code: its authors', "
        "lr / (warmup_ratio × steps of 3 examples).",
        resume="warned",
        methods=frozenset({"lora-sb"}),
    )
    start_samples: Optional[int] = option(
        None,
        "Samples of the first gradient; by default 0.1 %% of the examples, at least 25.",
        resume="warned",
        methods=SAMPLING,
        at_least=1,
    )
    start_memory: int = option(
        64,
        "MiB of a rank for gradients at the start; more: fewer passes.",
        resume="warned",
        methods=SAMPLING,
        at_least=1,
    )

    def __post_init__(self) -> None:
        """Check each option.

        Raises:
            UserError: a value is out of its bounds or cannot be read, or the method does not read
                an option that is set.
        """
        super().__post_init__()
        for each, _ in declarations(self):
            if not self.reads(each.name) and getattr(self, each.name) != default_of(each):
                raise UserError(f"--method {self.method} does not read --{each.name}: leave it out")
        self.interval  # noqa: B018 - raises where the option cannot be read
        self.bounds  # noqa: B018 - raises where the option cannot be read

    def reads(self, option: str) -> bool:
        """Whether the method reads an option of this group."""
        methods = declaration_of(type(self), option).methods
        return methods is None or self.method in methods

    @property
    def name(self) -> MethodName:
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
