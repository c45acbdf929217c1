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
        "r: the columns of A and B; cores are r × r; mora has as many parameters as A and B.",
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
        "Dropout of B's input; a rescale preserves a layer's function in evaluation mode only.",
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
    scaling_rule: Literal["adamw", "paper", "scalar", "nnls"] = option(
        "adamw",
        "adamw: the optimum within the bounds for a step of AdamW; for one of gradient descent, "
        "paper: column scaling (Theorem 5) where its solution is within the bounds, else scalar "
        "scaling (Theorem 3); scalar: always scalar scaling; nnls: the optimum within the bounds.",
        resume="warned",
        methods=SCALORA,
    )
    scaling_interval: str = option(
        "1",
        "Rescale at steps 0, I, 2I … (ScaLoRA-I); auto: solve at each step, and merge the layers "
        "whose scales have moved (auto_threshold).",
        resume="warned",
        methods=SCALORA,
    )
    auto_threshold: float = option(
        0.1,
        "scaling_interval auto merges a layer when |ln α| or |ln β| of a column exceeds this.",
        resume="warned",
        methods=SCALORA,
        above=0,
    )
    eta_lipschitz: Optional[float] = option(
        None,
        "The product ηL: smaller means larger columns, and steps as lr/√ηL; by default "
        "2.4 / (s·√r).",
        resume="warned",
        methods=SCALORA,
        above=0,
    )
    scale_bounds: list[str] = option(
        ["0.05", "5"],
        "Normalised column sizes stay between these two numbers; none: no bounds, as in the paper.",
        resume="warned",
        methods=SCALORA,
    )
    merge_target: Optional[Literal["weight", "carry"]] = option(
        None,
        "Where merges go: into W, or into a low-rank carry beside it; by default weight for dense "
        "bases and carry for 4-bit ones.",
        resume="fixed",
        methods=MERGING,
    )
    carry_rank: Optional[int] = option(
        None,
        "R, the rank that a full carry is compressed to; by default R + rank, the adapter's rank, "
        "is the smallest of 64, 128, 256, 320 and 512 that is at least 8 × rank.",
        resume="fixed",
        methods=MERGING,
        at_least=1,
    )
    carry_room: Optional[int] = option(
        None,
        "Columns of the carry beyond R; a merge takes rank of them; by default 4 × rank.",
        resume="fixed",
        methods=MERGING,
        at_least=1,
    )
    carry_limit: float = option(
        0.01,
        "Warn when a layer's carry has lost more than this share of its update.",
        resume="free",
        methods=MERGING,
        above=0,
    )
    merge_rounding: MergeRounding = option(
        "split",
        "16-bit bases; split: keep the low halves of merged weights (2 bytes each); nearest: round "
        "each merge to 16 bits.",
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
        "A's learning rate divided by B's (in the paper's names: B's by A's).",
        resume="warned",
        methods=frozenset({"lora-plus"}),
        above=0,
    )
    relora_interval: int = option(
        500,
        "Merge and initialize A and B again every so many steps.",
        resume="fixed",
        methods=RELORA,
        at_least=1,
    )
    relora_prune: float = option(
        0.99,
        "Share of the numbers of AdamW's m, the smallest ones, that become 0 after a merge, with "
        "those of v at the same places.",
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
        "η of the initialization; paper: the learning rate; code: as in its authors' code, "
        "lr / (warmup_ratio × steps of 3 examples).",
        resume="free",
        methods=frozenset({"lora-sb"}),
    )
    start_samples: Optional[int] = option(
        None,
        "Samples for the first gradient; by default 0.1 %% of the examples, at least 25.",
        resume="free",
        methods=SAMPLING,
        at_least=1,
    )
    start_memory: Optional[int] = option(
        None,
        "MiB on a rank for the gradients of the initialization, at most; by default what is free "
        "on the GPU, and half of what is free on the host.",
        resume="free",
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
        for each, declaration in declarations(self):
            read = declaration.read_by(self.method)
            if not read and getattr(self, each.name) != default_of(each):
                raise UserError(f"--method {self.method} does not read --{each.name}: leave it out")
        self.interval  # noqa: B018 - raises where the option cannot be read
        self.bounds  # noqa: B018 - raises where the option cannot be read

    def reads(self, option: str) -> bool:
        """Whether the method reads an option of this group."""
        return declaration_of(type(self), option).read_by(self.method)

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
    def eta_l(self) -> float:
        """The product ηL: ``eta_lipschitz``, or by default 2.4 / (s·√r) (see docs/method.md)."""
        if self.eta_lipschitz is not None:
            return self.eta_lipschitz
        return 2.4 * self.rank**0.5 / self.lora_alpha

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
