"""Initial values of LoRA-XS and LoRA-SB: frozen U and V, and the trained core R between them."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora_dist.layers.lora_init import generator_of
from scalora_dist.methods.init.initialization import Initialization

CORE_DEVIATION = 1e-5  # standard deviation of LoRA-XS's R


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

    The SVD is of a first step ``−η·sign(Σ ∇W)``, where η is the learning rate. U and V are
    orthonormal, up to the rounding to the engine's dtype in which they are kept. R = Σ_r / s with
    s = 1. A collective.
    """
    rank = init.args.rank
    added = init.added()
    cores: dict[str, Tensor] = {}
    for name, gradient in init.gradients():
        step = gradient.like(gradient.local.sign_().neg_())
        svd = init.svd(step, rank)
        # While R is 0, the model computes the same function, so the gradients of the next layers
        # are still those of W.
        added[f"{name}.U"].write_(svd.U)
        added[f"{name}.V"].write_(svd.V)
        cores[name] = torch.diag(init.learning_rate * svd.S)
    with init.engine.writing():
        added = init.added()
        for name, core in cores.items():
            added[f"{name}.R"].write_(core)
