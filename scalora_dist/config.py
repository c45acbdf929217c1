"""The options: dataclasses behind the YAML recipe and the command line (which overrides it)."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional

import torch
import yaml
from transformers import HfArgumentParser

from scalora_dist.data.arguments import DataArguments
from scalora_dist.errors import UserError
from scalora_dist.profiling.arguments import ProfileArguments

# Those of transformers' schedules that need no arguments of their own.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _check_at_least(args: Any, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: set at least {least}")


def _check_positive(args: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: set a positive number")


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: Optional[str] = option(
        None, "A folder in Hugging Face format or a hub name."
    )
    attn_implementation: Optional[str] = option(
        None,
        "eager, sdpa or flash_attention_2; by default flash_attention_2 in 16 bits on a GPU where "
        "it is installed (extra: flash) and the model has it, else sdpa.",
    )
    trust_remote_code: bool = option(False, "Run the model's own Python code from the hub.")
    load_in_4bit: bool = option(
        False, "Keep linear layers but the LM head in bitsandbytes' 4 bits (extra: quant)."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "Which 4-bit numbers.")
    bnb_4bit_use_double_quant: bool = option(
        True, "Quantize the blocks' sizes too: 0.016 bytes a weight beside its codes, not 0.063."
    )
    bnb_4bit_compute_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = option(
        None, "What 4-bit weights are multiplied in; by default the input's dtype."
    )
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = option(
        "uint8", "Of the tensors that hold the codes: uint8, or the training's dtype."
    )
    adapter_name_or_path: Optional[str] = option(
        None, "Continue from this PEFT LoRA adapter (a folder, or a hub name)."
    )


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
    merge_rounding: Literal["split", "nearest"] = option(
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
    start_samples: Optional[int] = option(
        None, "lora-sb, lora-ga: samples of the first gradient; by default 0.1 %%, at least 25."
    )
    start_memory: int = option(
        64, "lora-sb, lora-ga: MiB of a rank for gradients at the start; more: fewer passes."
    )

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "rank", "relora_interval", "start_memory")
        _check_at_least(self, 0, "relora_warmup_steps", "relora_prune")
        _check_positive(self, "eta_lipschitz", "lora_alpha", "alpha_multiplier", "lr_ratio")
        _check_positive(self, "auto_threshold", "carry_limit")
        for name in ("start_samples", "carry_rank", "carry_room"):
            if getattr(self, name) is not None:
                _check_at_least(self, 1, name)
        if self.relora_prune > 1:
            raise UserError(f"--relora_prune {self.relora_prune}: set a share, 0 to 1")
        self.interval  # noqa: B018 - raises where the option cannot be read
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: set a number in [0, 1)")
        self.bounds  # noqa: B018 - raises where the option cannot be read

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


@dataclass
class TrainArguments:
    _argument_group_name = "training"

    output_dir: Optional[str] = option(None, "Where the run's metrics, summary and model go.")
    overwrite_output_dir: bool = option(False, "Write into an output_dir that is not empty.")
    learning_rate: float = option(2e-4, "AdamW's peak learning rate.")
    weight_decay: float = option(0.0, "On A and B; pulls towards a moving point: 0 is right.")
    adam_beta1: float = option(0.9, "AdamW's β₁.")
    adam_beta2: float = option(0.999, "AdamW's β₂.")
    adam_epsilon: float = option(1e-8, "AdamW's ε.")
    max_grad_norm: float = option(1.0, "Clip the transformed gradients' norm to this; 0: never.")
    lr_scheduler_type: Schedule = option("linear", "transformers' schedule of that name.")
    warmup_ratio: float = option(0.0, "Share of the steps over which the learning rate rises.")
    num_train_epochs: float = option(1.0, "Passes over the training data.")
    max_steps: int = option(-1, "Optimizer steps; overrides num_train_epochs where positive.")
    per_device_train_batch_size: int = option(1, "Examples of one micro-batch of one rank.")
    per_device_eval_batch_size: int = option(8, "Examples of one evaluation batch of one rank.")
    gradient_accumulation_steps: int = option(1, "Micro-batches of one step.")
    train_batch_size: Optional[int] = option(
        None, "Examples of one step of all ranks; decides gradient_accumulation_steps."
    )
    eval_steps: int = option(0, "Also evaluate every so many steps; 0: only before and after.")
    logging_steps: int = option(1, "TensorBoard every so many steps; metrics.jsonl has every one.")
    seed: int = option(42, "Decides the data's order, what is held out and B's initial values.")
    bf16: bool = option(False, "bfloat16 weights with fp32 masters of A and B.")
    fp16: bool = option(False, "float16 weights with a loss scale (ZeRO stages 1 to 3).")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward.")
    update_rank_layers: int = option(
        8, "Layers whose accumulated update's rank is measured; 0: none."
    )
    rank_monitor_steps: int = option(
        0, "Estimate the updates' ranks every so many steps while training; 0: never."
    )
    rank_monitor_layers: int = option(8, "Layers that the rank monitor follows.")
    save_steps: int = option(500, "Write a checkpoint every so many steps; 0: only on a signal.")
    save_total_limit: int = option(3, "Keep the newest so many checkpoints.")
    on_save_failure: Literal["continue", "stop"] = option(
        "continue", "When a checkpoint cannot be written (disk full): train on, or stop."
    )
    resume_from_checkpoint: Optional[str] = option(
        None, "latest: the newest sound one in output_dir; or the path of one."
    )
    max_skipped_steps: int = option(
        20, "Stop when so many steps in a row had to be skipped (not finite)."
    )
    hang_timeout: int = option(
        600, "Seconds without progress after which a dead or hung rank ends the run."
    )
    save_model: bool = option(True, "Write the merged model to <output_dir>/model at the end.")
    adapter_rank: Optional[int] = option(
        None,
        "Also write what was merged into W as an adapter, its best approximation of this rank.",
    )
    ddp_timeout: int = option(1800, "Seconds after which a collective gives up.")

    def __post_init__(self) -> None:
        _check_positive(self, "learning_rate", "num_train_epochs")
        _check_at_least(self, 0, "weight_decay", "max_grad_norm", "eval_steps", "seed")
        _check_at_least(self, 0, "warmup_ratio", "update_rank_layers", "save_steps")
        _check_at_least(self, 0, "rank_monitor_steps")
        _check_at_least(self, 1, "rank_monitor_layers")
        _check_at_least(self, 1, "save_total_limit", "max_skipped_steps", "hang_timeout")
        _check_at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
        _check_at_least(self, 1, "gradient_accumulation_steps", "logging_steps", "ddp_timeout")
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: set a share of the steps, 0 to 1")
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: set one")
        if not self.output_dir:
            raise UserError("--output_dir is missing: say where the run's results go")
        for name in ("train_batch_size", "adapter_rank"):
            if getattr(self, name) is not None:
                _check_at_least(self, 1, name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as the options have it."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def settle_batch(self, ranks: int) -> None:
        """Make ``train_batch_size`` and ``gradient_accumulation_steps`` agree on so many ranks.

        Raises:
            UserError: the global batch is no whole number of micro-batches on every rank.
        """
        at_once = self.per_device_train_batch_size * ranks
        if self.train_batch_size is None:
            self.train_batch_size = at_once * self.gradient_accumulation_steps
        accumulation, rest = divmod(self.train_batch_size, at_once)
        if rest:
            raise UserError(
                f"--train_batch_size {self.train_batch_size} is no multiple of {ranks} rank(s) × "
                f"{self.per_device_train_batch_size} examples: change the ranks or "
                "--per_device_train_batch_size"
            )
        if self.gradient_accumulation_steps not in (1, accumulation):
            raise UserError(
                f"--train_batch_size {self.train_batch_size} takes {accumulation} micro-batch(es) "
                f"on {ranks} rank(s): leave out --gradient_accumulation_steps"
            )
        self.gradient_accumulation_steps = accumulation


@dataclass
class LaunchArguments:
    _argument_group_name = "launch"

    config: Optional[str] = option(
        None, "A YAML file of these options; the command line overrides it."
    )
    ds_config: Optional[str] = option(
        None, "Train under DeepSpeed with this JSON, e.g. ds_configs/zero3.json."
    )
    fsdp: bool = option(False, "Train under FSDP2 (start with torchrun).")
    fsdp_config: Optional[str] = option(None, "FSDP2's settings, JSON or YAML.")
    dry_run: bool = option(
        False, "Print what the run will need (as tools/plan.py), and end; loads no weights."
    )
    local_rank: int = option(-1, "Set by the launcher.")


@dataclass
class Options:
    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    train: TrainArguments
    launch: LaunchArguments
    profile: ProfileArguments = field(default_factory=ProfileArguments)


class Parser(HfArgumentParser):
    """Raises a UserError instead of printing usage and leaving."""

    source = ""  # what is being read, for messages

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}{message}; --help lists the options")


def parse_options(argv: Sequence[str]) -> Options:
    """Read the command line, and the YAML file its ``--config`` names, into dataclasses.

    A recipe is a command line written down: its fields are parsed by the same parser, first.

    Raises:
        UserError: a missing or malformed file, an unknown field or choice, a value that cannot be.
    """
    groups = [
        *(ModelArguments, DataArguments, MethodArguments),
        *(TrainArguments, LaunchArguments, ProfileArguments),
    ]
    parser = Parser(
        groups,
        allow_abbrev=False,
        usage="deepspeed --num_gpus N launch/train.py --ds_config FILE | "
        "torchrun --nproc_per_node N launch/train.py --fsdp | python launch/train.py, each with "
        "--model_name_or_path MODEL --dataset DATA --output_dir FOLDER [--config RECIPE.yaml] "
        "[--option value ...]",
        description="Fine-tune with ScaLoRA on shards.",
    )
    known = sorted({action.dest for action in parser._actions} - {"help"})
    named, left = parser.parse_known_args(argv)
    if left:
        raise UserError(
            _unknown_field(left[0].lstrip("-").partition("=")[0], known)
            if left[0].startswith("-")
            else f"{left[0]!r} belongs to no field: write --field value"
        )
    words = []
    for name, value in _read_recipe(named.config).items() if named.config else ():
        if name not in known:
            raise UserError(f"{named.config}: {_unknown_field(str(name), known)}")
        if name == "config":
            raise UserError(f"{named.config}: a recipe cannot name another: remove `config`")
        parser.source = f"{named.config}, {name}: "
        parser.parse_args(field := _words(name, value))
        words += field
    parser.source = ""
    return Options(*parser.parse_args_into_dataclasses([*words, *argv]))


def _read_recipe(path: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; see launch/recipes/") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 text: {error.reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"--config {path}{where}: {problem}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold `field: value` lines")
    return recipe


def _words(name: str, value: Any) -> list[str]:
    """One field of a recipe as the command line has it; null leaves it at its default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _unknown_field(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown field {name!r}{hint}; the fields are {', '.join(known)}"
