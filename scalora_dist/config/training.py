"""Options of the training itself: steps, batches, precision, checkpoints, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

import torch

from scalora_dist.config.option import Group, option
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


@dataclass(frozen=True)
class TrainArguments(Group):
    _argument_group_name = "training"

    output_dir: Optional[str] = option(
        None, "Where the run's metrics, summary and model go.", resume="free"
    )
    overwrite_output_dir: bool = option(
        False,
        "Replace results in output_dir; they are kept until the new ones are complete.",
        resume="free",
    )
    learning_rate: float = option(2e-4, "AdamW's peak learning rate.", resume="warned", above=0)
    weight_decay: float = option(
        0.0,
        "AdamW's weight decay; with methods that merge, 0 is right: it would pull towards a weight "
        "that each merge changes.",
        resume="warned",
        at_least=0,
    )
    adam_beta1: float = option(0.9, "AdamW's β₁.", resume="warned", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's β₂.", resume="warned", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's ε.", resume="warned", above=0)
    max_grad_norm: float = option(
        1.0,
        "Clip the norm of the gradients to this, after the method's transform; 0: never.",
        resume="warned",
        at_least=0,
    )
    lr_scheduler_type: Schedule = option(
        "linear", "The schedule of transformers with this name.", resume="warned"
    )
    warmup_ratio: float = option(
        0.0,
        "Share of the steps over which the learning rate rises to its peak.",
        resume="warned",
        at_least=0,
        at_most=1,
    )
    num_train_epochs: float = option(
        1.0, "Passes over the training data.", resume="warned", above=0
    )
    max_steps: int = option(
        -1,
        "Optimizer steps; -1: num_train_epochs decides.",
        resume="warned",
        at_least=-1,
    )
    per_device_train_batch_size: int = option(
        1, "Examples of one micro-batch on one rank.", resume="free", at_least=1
    )
    per_device_eval_batch_size: int = option(
        8, "Examples of one evaluation batch on one rank.", resume="free", at_least=1
    )
    gradient_accumulation_steps: int = option(
        1, "Micro-batches of one step.", resume="free", at_least=1
    )
    dataloader_num_workers: int = option(
        0,
        "Processes of each rank that read and pad the training batches ahead; 0: the rank itself, "
        "while its device computes.",
        resume="free",
        at_least=0,
    )
    train_batch_size: Optional[int] = option(
        None,
        "Examples of one step on all ranks; decides gradient_accumulation_steps.",
        resume="fixed",
        at_least=1,
    )
    eval_steps: int = option(
        0, "Also evaluate every so many steps; 0: only before and after.", resume="free", at_least=0
    )
    logging_steps: int = option(
        1,
        "Write to TensorBoard every so many steps; metrics.jsonl has every step.",
        resume="free",
        at_least=1,
    )
    seed: int = option(
        42,
        "Decides the data's order, what is held out and B's initial values.",
        resume="fixed",
        at_least=0,
        below=2**31,
    )
    bf16: bool = option(False, "bfloat16 weights with fp32 masters of A and B.", resume="fixed")
    fp16: bool = option(
        False, "float16 weights with a loss scale (ZeRO stages 1 to 3).", resume="fixed"
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward.", resume="free"
    )
    activation_offloading: bool = option(
        False, "Keep activations in the host's memory until the backward.", resume="free"
    )
    torch_compile: bool = option(
        False,
        "Compile the decoder blocks; not under ZeRO-3, in 4 bits or with a carry.",
        resume="warned",
    )
    update_rank_layers: int = option(
        8,
        "Number of layers whose accumulated update's rank is measured at the end; 0: none.",
        resume="free",
        at_least=0,
    )
    rank_monitor_steps: int = option(
        0,
        "Estimate the updates' ranks every so many steps while training; 0: never.",
        resume="fixed",
        at_least=0,
    )
    rank_monitor_layers: int = option(
        8, "Number of layers that the rank monitor follows.", resume="fixed", at_least=1
    )
    save_steps: int = option(
        500,
        "Write a checkpoint every so many steps; 0: only at the end and on a signal.",
        resume="free",
        at_least=0,
    )
    save_total_limit: int = option(
        3, "Number of checkpoints to keep, the newest.", resume="free", at_least=1
    )
    on_save_failure: Literal["continue", "stop"] = option(
        "continue",
        "When a checkpoint cannot be written (disk full): train on, or stop.",
        resume="free",
    )
    resume_from_checkpoint: Optional[str] = option(
        None,
        "latest: the newest undamaged checkpoint in output_dir; or the path of a checkpoint.",
        resume="free",
    )
    max_skipped_steps: int = option(
        20,
        "Stop when so many steps in a row were skipped, since loss or gradients were not finite.",
        resume="free",
        at_least=1,
    )
    hang_timeout: int = option(
        600,
        "Seconds without progress after which a dead or hung rank ends the run.",
        resume="free",
        at_least=1,
    )
    save_model: bool = option(
        True, "Write the merged model to <output_dir>/model at the end.", resume="free"
    )
    adapter_rank: Optional[int] = option(
        None,
        "Also write what was merged into W as an adapter, its best approximation of this rank.",
        resume="free",
        at_least=1,
    )
    ddp_timeout: int = option(
        1800, "Seconds after which a collective gives up.", resume="free", at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0:
            raise UserError(
                "--max_steps 0: set a number of steps, or leave it out: --num_train_epochs decides"
            )
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UserError(
                f"--learning_rate {self.learning_rate}: --lr_scheduler_type polynomial falls to "
                f"{POLYNOMIAL_END}: set a higher rate, or another schedule"
            )
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: set one")
        if not self.output_dir:
            raise UserError("--output_dir is missing: say where the run's results go")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32
