"""Initial values of PiSSA and LoRA-GA: A and B, with s·A Bᵀ subtracted from W.

The model's function stays the same. PEFT's own initializations gather full weights. These are the
same formulas on shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.layout import full_tensor
from scalora_dist.core.split_precision import add_low_rank_
from scalora_dist.layers.peft_layers import factor_names, factor_scaling
from scalora_dist.methods.init.initialization import Initialization

STABLE_GAMMA = 16  # γ: PEFT's default for LoRA-GA's scale "stable"


def init_pissa(init: Initialization) -> None:
    """PiSSA (arXiv 2404.02948, equations 2-4): A = U_r √(Σ_r/s) and B = V_r √(Σ_r/s).

    They are from W's truncated SVD. Layers are processed one after another. The SVD works on each
    rank's shard of W; W is not gathered. A collective.
    """
    factors = _Factors(init)
    for name, weight in init.weights().items():
        svd = init.svd(weight, init.args.rank)
        root = (svd.S / factors.scaling(name)).sqrt()
        factors.put(name, svd.U * root, svd.V * root)
    factors.write()


def init_lora_ga(init: Initialization) -> None:
    """LoRA-GA (arXiv 2407.05000) as PEFT has it, with "ArB2r" and "stable", its defaults.

        U Σ Vᵀ = ∇W,    A = U_{r+1…2r} Σ_{r+1…2r} · m^¼/√γ,    B = V_{1…r},    W −= s·A Bᵀ

    The authors' public code has no Σ, nor has the paper's text, and it scales both factors:
    A = U_{r+1…2r} · m^¼/√γ and B = V_{1…r} · m^¼/√γ. So here the size of A follows the gradient's.

    ∇W is the gradient of the mean loss over the target tokens of all samples, in evaluation mode.
    PEFT averages the gradients of the caller's batches, in training mode. The SVD is that of
    ``truncated_svd``; PEFT's is a random sketch. A collective.
    """
    rank = init.args.rank
    factors = _Factors(init)
    for name, gradient in init.gradients():
        svd = init.svd(gradient, 2 * rank)
        scale = gradient.shape[0] ** 0.25 / STABLE_GAMMA**0.5
        factors.put(name, svd.U[:, rank:] * svd.S[rank:] * scale, svd.V[:, :rank])
    factors.write()


class _Factors:
    """Collects this rank's shards of the new A and B, and writes them all at the end.

    Writing them earlier would change the gradients of the layers that follow.
    """

    def __init__(self, init: Initialization) -> None:
        self.init = init
        self.layers = init.engine.adapted
        self.shards = init.added()
        self.parts: dict[str, Tensor] = {}

    def scaling(self, layer: str) -> float:
        return factor_scaling(self.layers[layer])

    def put(self, layer: str, a: Tensor, b: Tensor) -> None:
        """Keep this rank's shards of the full A (m, r) and B (n, r), as PEFT's A and Bᵀ.

        They are rounded to the dtype of W, as PEFT does: a forward may read them in that dtype.
        """
        for name, whole in zip(factor_names(layer), (a, b.T), strict=True):
            shard = self.shards[name]
            part = shard.like(torch.empty_like(shard.local))
            part.write_(whole.to(self.init.engine.dtype))
            self.parts[name] = part.local

    def write(self) -> None:
        """Write the factors into the model, and W −= s·A Bᵀ. A collective."""
        with self.init.engine.writing():
            shards = self.init.added()
            for name, part in self.parts.items():
                shards[name].local.copy_(part)
            for layer, weight in self.init.weights().items():
                self._subtract(layer, weight, [shards[name] for name in factor_names(layer)])

    def _subtract(self, layer: str, weight: FlatShard, factors: list[FlatShard]) -> None:
        a, b_transposed = (full_tensor(shard, self.init.engine.world.device) for shard in factors)
        add_low_rank_(weight, -self.scaling(layer) * a, b_transposed.T, None)
