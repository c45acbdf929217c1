"""Where LoRA-XS and LoRA-SB put their frozen U and V, and the core R between them."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora_dist.adapters.init import generator_of
from scalora_dist.starts.start import Start

CORE_DEVIATION = 1e-5  # of LoRA-XS's R


def start_lora_xs(start: Start) -> None:
    """U = U_r Σ_r and V = V_r of W's truncated SVD; R Gaussian, 1e-5 (arXiv 2405.17604, section 3).

    By turns over the layers, from each rank's own rows of W.
    """
    rank = start.args.rank
    with start.engine.writing():
        added = start.added()
        for name, weight in start.weights().items():
            svd = start.svd(weight, rank)
            added[f"{name}.U"].write_(svd.U * svd.S)
            added[f"{name}.V"].write_(svd.V)
            core = torch.randn(rank, rank, generator=generator_of(name, start.seed))
            added[f"{name}.R"].write_(core * CORE_DEVIATION)


def start_lora_sb(start: Start) -> None:
    """U, V and R of the truncated SVD of a first step ``−η·sign(Σ ∇W)`` (seed 003, equations 7, 8).

    U and V are orthonormal (as far as the engine's dtype goes, in which they are kept), R = Σ_r / s
    with s = 1, η is the learning rate.
    """
    rank = start.args.rank
    added = start.added()
    cores: dict[str, Tensor] = {}
    for name, gradient in start.gradients():
        step = gradient.like(gradient.local.sign_().neg_())
        svd = start.svd(step, rank)
        # While R is 0 the model computes what it did: the next layers' gradients are W's own.
        added[f"{name}.U"].write_(svd.U)
        added[f"{name}.V"].write_(svd.V)
        cores[name] = torch.diag(start.learning_rate * svd.S)
    with start.engine.writing():
        added = start.added()
        for name, core in cores.items():
            added[f"{name}.R"].write_(core)
