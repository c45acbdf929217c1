"""Initial values of LoRA-XS and LoRA-SB: frozen U and V, and the trained core R between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scalora_dist.layers.lora_init import generator_of
from scalora_dist.methods.init.initialization import Initialization

CORE_DEVIATION = 1e-5  # standard deviation of LoRA-XS's R
SB_BATCH = 3  # examples of a step, as LoRA-SB's public code counts them for its η


def init_lora_xs(init: Initialization) -> None:
    """LoRA-XS (arXiv 2405.17604, section 3): U = U_r Σ_r and V = V_r of W's truncated SVD.

    R is Gaussian with standard deviation 1e-5. Layers are processed one after another. The SVD
    works on each rank's shard of W; W is not gathered. A collective.
    """
    rank = init.args.rank
    with init.engine.writing():
        added = init.added()
        for name, weight in init.weights().items():
            svd = init.svd(weight, rank)
            added[f"{name}.U"].write_(svd.U * svd.S)
            added[f"{name}.V"].write_(svd.V)
            core = torch.randn(rank, rank, generator=generator_of(name, init.seed))
            added[f"{name}.R"].write_(core * CORE_DEVIATION)


def init_lora_sb(init: Initialization) -> None:
    """LoRA-SB (arXiv 2411.19557, equations 7 and 8): U, V and R from a truncated SVD.

    The SVD is of a first step ``−η·sign(Σ ∇W)``, with the η of ``lora_sb_eta``. U and V are
    orthonormal, up to the rounding to the engine's dtype in which they are kept. R = Σ_r / s with
    s = 1. A collective.
    """
    rank = init.args.rank
    eta = lora_sb_eta(init)
    added = init.added()
    cores: dict[str, Tensor] = {}
    for name, gradient in init.gradients():
        step = gradient.like(gradient.local.sign_().neg_())
        svd = init.svd(step, rank)
        # While R is 0, the model computes the same function, so the gradients of the next layers
        # are still those of W.
        added[f"{name}.U"].write_(svd.U)
        added[f"{name}.V"].write_(svd.V)
        cores[name] = torch.diag(eta * svd.S)
    with init.engine.writing():
        added = init.added()
        for name, core in cores.items():
            added[f"{name}.R"].write_(core)


def lora_sb_eta(init: Initialization) -> float:
    """η of LoRA-SB's first step, which ``--sb_eta`` chooses.

    paper: the learning rate (equation 7). code: the learning rate of the first step of the warm-up,
    ``lr / (warmup_ratio · steps)``, with the steps that the run would have at 3 examples each. The
    authors' public code computes this, and rounds the steps of an epoch up, not those of the run.
    """
    if init.args.sb_eta == "paper":
        return init.learning_rate
    return init.learning_rate / (init.warmup_ratio * math.ceil(init.examples / SB_BATCH))
