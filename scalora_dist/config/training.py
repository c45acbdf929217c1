"""Options of the training itself: steps, batches, precision, checkpoints, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

import torch

from scalora_dist.config.fields import check_at_least, check_positive, option
from scalora_dist.errors import UserError

# The schedules of transformers that need no further arguments.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
POLYNOMIAL_END = 1e-7  # the learning rate that transformers' polynomial schedule falls to


@dataclass
class TrainArguments:
    _argument_group_name = "training"

    output_dir: Optional[str] = option(None, "Where the run's metrics, summary and model go.")
    overwrite_output_dir: bool = option(
        False, "Replace results in output_dir; they are kept until the new ones are whole."
    )
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
    save_steps: int = option(
        500, "Write a checkpoint every so many steps; 0: only at the end and on a signal."
    )
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
        check_positive(self, "learning_rate", "num_train_epochs")
        check_at_least(self, 0, "weight_decay", "max_grad_norm", "eval_steps", "seed")
        check_at_least(self, 0, "warmup_ratio", "update_rank_layers", "save_steps")
        check_at_least(self, 0, "rank_monitor_steps")
        check_at_least(self, 1, "rank_monitor_layers")
        check_at_least(self, 1, "save_total_limit", "max_skipped_steps", "hang_timeout")
        check_at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
        check_at_least(self, 1, "gradient_accumulation_steps", "logging_steps", "ddp_timeout")
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: set a share of the steps, 0 to 1")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UserError(
                f"--learning_rate {self.learning_rate}: --lr_scheduler_type polynomial falls to "
                f"{POLYNOMIAL_END}: set a higher rate, or another schedule"
            )
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: set one")
        if not self.output_dir:
            raise UserError("--output_dir is missing: say where the run's results go")
        for name in ("train_batch_size", "adapter_rank"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def settle_batch(self, ranks: int) -> None:
        """Make ``train_batch_size`` and ``gradient_accumulation_steps`` agree on ``ranks`` ranks.

        Raises:
            UserError: the global batch is not a whole number of micro-batches on every rank, or
                does not agree with the given ``gradient_accumulation_steps``.
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
