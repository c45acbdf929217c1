"""Linear layers with adapters: the factors A and B, a small core R, or a square matrix M."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.layers.low_rank_product import Coded, LowRankProduct

L = TypeVar("L", bound="AdaptedLinear")
LR = TypeVar("LR", bound="LowRankLinear")
MERGED_COLUMNS = 256  # columns of W merged at a time, where ΔW is only known as ΔW x


class AdaptedLinear(nn.Linear):
    """``y = W x + bias + s · update(dropout(x))`` with W (m, n) and bias frozen.

    Made from a linear layer by changing that object's class. So the layer keeps its name, its
    parameters (with all that an engine has attached to them) and every reference to it. A state
    dict has the model's own keys plus the method's, such as ``<layer>.A``.

    Attributes:
        scaling: s.
        dropout: probability of dropout.
        coded: whether W is stored as codes (``FourBitLinear``).
    """

    scaling: float
    dropout: float
    coded = False

    @classmethod
    def put_on(cls: type[L], linear: nn.Linear, *, scaling: float, dropout: float) -> L:
        """Change ``linear`` to this class in place. The caller adds the adapter's parameters.

        A 4-bit layer keeps its way to compute W x. Other classes are never chosen as targets.
        """
        kind = type(linear)
        assert kind is nn.Linear or issubclass(kind, Coded), f"{kind} may compute W x otherwise"
        linear.__class__ = cls if kind is nn.Linear else _on(cls, kind)
        assert isinstance(linear, cls)
        linear.scaling, linear.dropout = scaling, dropout
        return linear

    def forward(self, x: Tensor) -> Tensor:
        # x gets two gradients here, through W and through the adapter. With a node of its own for
        # this layer, autograd adds these two first, on every engine. ZeRO-3's hooks make such a
        # node, other engines do not, and in bf16 another order of sums is another rounding.
        x = x.view_as(x)
        y = super().forward(x)
        added = self.update(F.dropout(x, self.dropout, self.training))
        return torch.add(y, added.to(y.dtype), alpha=self.scaling)

    def update(self, x: Tensor) -> Tensor:
        """ΔW x, (…, n) → (…, m). Cast parameters to x's dtype: they may be fp32 master weights."""
        raise NotImplementedError

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        """``weight += s·ΔW``, in place.

        Args:
            weight: full W (m, n).
            own: this layer's own parameters by name, full, of ``weight``'s dtype.
        """
        raise NotImplementedError


class LowRankLinear(AdaptedLinear):
    """ΔW = A Bᵀ, both trained (LoRA and most others).

    A is (m, r), B is (n, r). Both factors are tall, so a shard of rows is a shard of features.
    In PEFT's names A is ``lora_B.weight`` and Bᵀ is ``lora_A.weight``.

    Attributes:
        used: number of filled columns of a carry.
    """

    A: nn.Parameter
    B: nn.Parameter
    used = 0

    @classmethod
    def adapt(
        cls: type[LR], linear: nn.Linear, a: Tensor, b: Tensor, *, scaling: float, dropout: float
    ) -> LR:
        """Change ``linear`` to this class in place, with A = a (m, r) and B = b (n, r)."""
        layer = cls.put_on(linear, scaling=scaling, dropout=dropout)
        layer.A, layer.B = nn.Parameter(a), nn.Parameter(b)
        return layer

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def carried(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """C and D of a carry beside W (``CarryLinear``), or None."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        # Dropout is for A and B only: a carry belongs to W.
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        C, D = self.carried or (None, None)
        y = LowRankProduct.apply(
            _rows(x),
            None if dropped is None else _rows(dropped),
            self.weight,
            self.bias,
            self.A,
            self.B,
            C,
            D,
            self.used,
            self.scaling,
            cast(Coded, self) if self.coded else None,
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        weight.addmm_(own["A"], own["B"].T, alpha=self.scaling)


class CoreLinear(AdaptedLinear):
    """ΔW = U R Vᵀ (LoRA-XS, LoRA-SB): U (m, r) and V (n, r) are frozen, R (r, r) is trained."""

    U: nn.Parameter
    R: nn.Parameter
    V: nn.Parameter

    @classmethod
    def adapt(
        cls, linear: nn.Linear, rank: int, *, scaling: float, dropout: float, dtype: torch.dtype
    ) -> CoreLinear:
        """Change ``linear`` to a CoreLinear in place, all zero; it is initialized once sharded."""
        layer = cls.put_on(linear, scaling=scaling, dropout=dropout)
        u = torch.zeros(layer.out_features, rank, dtype=dtype)
        v = torch.zeros(layer.in_features, rank, dtype=dtype)
        layer.U = nn.Parameter(u, requires_grad=False)
        layer.V = nn.Parameter(v, requires_grad=False)
        layer.R = nn.Parameter(torch.zeros(rank, rank, dtype=dtype))
        return layer

    def update(self, x: Tensor) -> Tensor:
        z = F.linear(x @ self.V.to(x.dtype), self.R.to(x.dtype))
        return F.linear(z, self.U.to(x.dtype))

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        weight.addmm_(own["U"] @ own["R"], own["V"].T, alpha=self.scaling)


class SquareLinear(AdaptedLinear):
    """ΔW x = decompress(M compress(x)), M (r̂, r̂) trained: MoRA (arXiv 2405.12130, equation 9).

    r̂² ≤ (m + n)·r. x is divided into pieces of r̂ features; its beginning fills up the last piece.
    Piece j is rotated by RoPE's angles at position j, and M is applied to each piece. The results
    are concatenated, then repeated or truncated to m outputs.
    """

    M: nn.Parameter

    @classmethod
    def adapt(
        cls, linear: nn.Linear, rank: int, *, scaling: float, dropout: float, dtype: torch.dtype
    ) -> SquareLinear:
        """Change ``linear`` to a SquareLinear in place, M = 0, at most as large as A and B."""
        layer = cls.put_on(linear, scaling=scaling, dropout=dropout)
        side = square_side(layer.out_features, layer.in_features, rank)
        layer.M = nn.Parameter(torch.zeros(side, side, dtype=dtype))
        return layer

    def update(self, x: Tensor) -> Tensor:
        return self._through(x, self.M.to(x.dtype))

    def _through(self, x: Tensor, square: Tensor) -> Tensor:
        side = square.shape[0]
        pieces = ceil_div(self.in_features, side)
        # x is repeated to fill the pieces, more than once where x is shorter than one piece.
        around = ceil_div(pieces * side, self.in_features)
        filled = x.repeat(*(1 for _ in x.shape[:-1]), around)[..., : pieces * side]
        turned = _rotate(filled.unflatten(-1, (pieces, side)))
        outputs = F.linear(turned, square).flatten(-2)
        repeats = ceil_div(self.out_features, outputs.shape[-1])
        return outputs.repeat(*(1 for _ in x.shape[:-1]), repeats)[..., : self.out_features]

    def merge_(self, weight: Tensor, own: Mapping[str, Tensor]) -> None:
        square = own["M"]
        for columns in torch.arange(self.in_features, device=square.device).split(MERGED_COLUMNS):
            unit = F.one_hot(columns, self.in_features).to(square)
            weight[:, columns] += self.scaling * self._through(unit, square).T


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


_made: dict[tuple[type, type], Any] = {}


def _on(cls: type, kind: type) -> Any:
    """The class of a method's layer on a class of layers whose W is codes; created once."""
    return _made.setdefault((cls, kind), type(cls.__name__, (cls, kind), {"coded": True}))


def square_side(out_features: int, in_features: int, rank: int) -> int:
    """MoRA's r̂ = ⌊√((m + n) r)⌋, rounded down to an even number, because pairs are rotated."""
    return max(2, math.isqrt((out_features + in_features) * rank) // 2 * 2)


def _rotate(pieces: Tensor) -> Tensor:
    """Piece j of (…, pieces, r̂) rotated by RoPE's j·10000^(−2i/r̂) in the planes (i, i + r̂/2)."""
    count, side = pieces.shape[-2:]
    # Angles in fp32 at least: bf16 has too few digits for large positions.
    dtype = torch.promote_types(pieces.dtype, torch.float32)
    steps = torch.arange(0, side, 2, device=pieces.device, dtype=dtype)
    positions = torch.arange(count, device=pieces.device, dtype=dtype)
    angles = torch.outer(positions, 10000 ** (-steps / side))
    cos, sin = angles.cos().to(pieces.dtype), angles.sin().to(pieces.dtype)
    first, second = pieces.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def adapted_linear(layer: nn.Module) -> nn.Linear:
    """The linear layer that holds W: the layer itself, or the one that a PEFT layer wraps."""
    return cast(nn.Linear, getattr(layer, "base_layer", layer))


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a method added to a layer, by name in the layer: all but W and bias."""
    linear = adapted_linear(layer)
    loaded = {id(linear.weight), id(linear.bias)}
    return {name: p for name, p in layer.named_parameters() if id(p) not in loaded}
