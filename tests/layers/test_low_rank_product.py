"""LoRA's layer against dense float64 formulas, and its kernels and bytes against PEFT's layer."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.layers.carry_linear import CarryLinear
from scalora_dist.layers.fourbit_linear import FourBit, FourBitLinear
from scalora_dist.layers.target_modules import inject
from scalora_dist.profiling.kernels import Counts, KernelCount
from tests.support import families

M, N, RANK, USED = 96, 64, 4, 6
SCALING = 1.7  # no power of two: a product with it is rounded
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Largest relative error, in multiples of the dtype's ε. In 16 bits it is 0.33, and 0.45 where s and
# the sums are kernels of their own.
ROUNDINGS = {FP64: 4.0, FP32: 4.0, BF16: 0.4, FP16: 0.4}


def adapted(
    kind: type[LowRankLinear], dtype: torch.dtype, masters: torch.dtype, **others: Any
) -> Any:
    """A layer with random factors, and a carry if ``kind`` has one."""
    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=others.pop("bias", True), dtype=dtype).requires_grad_(False)
    if fourbit := others.pop("fourbit", None):
        linear = FourBitLinear.quantize(linear, fourbit)
    a, b = torch.randn(M, RANK, dtype=masters), torch.randn(N, RANK, dtype=masters) / N**0.5
    layer = kind.adapt(linear, a, b, scaling=SCALING, dropout=others.pop("dropout", 0.0))
    if isinstance(layer, CarryLinear):
        layer.add_carry(USED + 3, dtype)
        layer.used = USED
        layer.C.data[:, :USED].normal_()
        layer.D.data[:, :USED].normal_().div_(N**0.5)
    return layer


def off(ours: Tensor | None, exact: Tensor | None) -> float:
    """Relative distance."""
    assert ours is not None and exact is not None
    exact = exact.detach()
    return float((ours.detach().double() - exact).norm() / exact.norm())


def in_float64(layer: Any, x: Tensor, kept: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
    """y, and what autograd needs to give the gradients of x, A and B."""
    A, B = (p.detach().double().requires_grad_() for p in (layer.A, layer.B))
    x = x.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.double()
    y = F.linear(x, dense, bias) + SCALING * (x * kept) @ B @ A.T
    if layer.carried:
        y = y + SCALING * x @ layer.D.double() @ layer.C.double().T
    return y, x, A, B


@pytest.mark.parametrize("kind", [LowRankLinear, CarryLinear])
@pytest.mark.parametrize(
    ("dtype", "masters"), [(FP64, FP64), (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # 0.5: exact in 16 bits
def test_outputs_and_gradients_are_the_formulas(
    kind: type[LowRankLinear], dtype: torch.dtype, masters: torch.dtype, dropout: float
) -> None:
    for bias in (False, True):
        layer = adapted(kind, dtype, masters, bias=bias, dropout=dropout)
        for p in (layer.A, layer.B):  # the layer computes with rounded factors
            p.data = p.data.to(dtype).to(masters)
        x = torch.randn(3, 50, N, dtype=dtype, requires_grad=True)
        torch.manual_seed(1)
        kept = F.dropout(torch.ones_like(x), dropout)
        torch.manual_seed(1)
        y = layer(x)
        grad_y = torch.randn_like(y)
        y.backward(grad_y)
        assert layer.A.grad.dtype == layer.B.grad.dtype == masters
        wanted, *leaves = in_float64(layer, x, kept.double(), layer.weight.double())
        wanted.backward(grad_y.double())
        gradients = [p.grad for p in (x, layer.A, layer.B)]
        pairs = zip((y, *gradients), (wanted, *(p.grad for p in leaves)), strict=True)
        for ours, exact in pairs:
            assert off(ours, exact) < ROUNDINGS[dtype] * torch.finfo(dtype).eps


def test_four_bits() -> None:
    """W is dequantized in the dtype that was asked for, in forward and backward."""
    fourbit = FourBit("nf4", double_quant=True, compute_dtype=FP32, storage=torch.uint8)
    layer = adapted(LowRankLinear, BF16, FP32, fourbit=fourbit)
    x = torch.randn(7, N, dtype=BF16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    dense = layer.dense(layer.weight, FP32).double()
    wanted, x64, A, _ = in_float64(layer, x, torch.ones(()), dense)
    wanted.sum().backward()
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == BF16
    for ours, exact in ((y, wanted), (x.grad, x64.grad), (layer.A.grad, A.grad)):
        assert off(ours, exact) < 8e-3


@pytest.mark.parametrize("kind", [LowRankLinear, CarryLinear])
@pytest.mark.parametrize("fourbit", [False, True])
@pytest.mark.parametrize("shape", [(6, N), (2, 3, N)])
def test_an_output_can_be_changed_in_place(
    kind: type[LowRankLinear], fourbit: bool, shape: tuple[int, ...]
) -> None:
    """OLMo clamps its queries in place, and Llama-4 adds to what a layer returns."""
    four = FourBit("nf4", double_quant=True, compute_dtype=None, storage=torch.uint8)
    layer = adapted(kind, FP32, FP32, fourbit=four if fourbit else None)
    found = []
    for in_place in (False, True):
        x = torch.ones(shape, requires_grad=True)
        y = layer(x * 0.5)
        assert y.dim() > 2 or not y._is_view()
        y = y.add_(1.0).clamp_(-0.5, 1.5) if in_place else (y + 1.0).clamp(-0.5, 1.5)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), (x, layer.A, layer.B))])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0 and torch.equal(one, other)


def test_a_layer_with_a_product_of_its_own_is_refused() -> None:
    """It would be computed as W x + bias."""

    class Other(nn.Linear):
        pass

    with pytest.raises(AssertionError, match="Other"):
        LowRankLinear.put_on(Other(N, M), scaling=1.0, dropout=0.0)


def test_a_model_that_clamps_its_queries_trains() -> None:
    model = families.build("olmo", 97)

    def adapt(_: str, linear: nn.Linear) -> LowRankLinear:
        a, b = (torch.randn(size, RANK) for size in linear.weight.shape)
        return LowRankLinear.adapt(linear, a, b, scaling=1.0, dropout=0.0)

    layers = inject(model, ["q_proj"], RANK, adapt)
    model(torch.arange(2, 12).view(2, 5)).logits.square().sum().backward()
    for layer in layers.values():
        assert layer.A.grad is not None and layer.A.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", [LowRankLinear, CarryLinear])
def test_parameters_are_saved_as_such_and_no_output(
    kind: type[LowRankLinear], dropout: float, dtype: torch.dtype
) -> None:
    """ZeRO-3 and FSDP2 free what a saved parameter points to, but not a view or a copy of it.

    Of fp32 masters beside bf16, the copies of A and B in bf16 are saved, if there is no carry.
    """
    layer = adapted(kind, dtype, FP32, dropout=dropout)
    x = torch.randn(50, N, requires_grad=True, dtype=dtype)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    wholes = {p.data_ptr(): p for p in layer.parameters()}
    parameters = [t for t in saved if t.data_ptr() in wholes]
    not_saved = [layer.bias]
    if dtype == BF16 and not layer.carried:
        not_saved += [layer.A, layer.B]
    expected = wholes.keys() - {p.data_ptr() for p in not_saved}
    assert {t.data_ptr() for t in parameters} == expected
    assert all(t.shape == wholes[t.data_ptr()].shape for t in parameters)
    others = [t for t in saved if t.data_ptr() not in wholes]
    assert all(t.shape[-1] in (N, RANK) for t in others)  # x or dropout's, Bᵀ d, copies
    assert y.shape == (50, M)


def count(layer: nn.Module, x: Tensor) -> tuple[Counts, Counts]:
    """Of the forward and of the backward."""
    with KernelCount() as kernels:
        y = layer(x)
    forward, grad_y = kernels.take(), torch.empty_like(y)
    with kernels:
        y.backward(grad_y)
    return forward, kernels.take()


def ours_and_pefts(
    m: int, n: int, dtype: torch.dtype, masters: torch.dtype, dropout: float
) -> list[tuple[Counts, Counts]]:
    """Counts of one layer each, for 2048 tokens and rank 16."""

    def linear() -> nn.Linear:
        return nn.Linear(n, m, bias=False, device="meta", dtype=dtype).requires_grad_(False)

    a, b = (torch.empty(size, 16, device="meta") for size in (m, n))
    ours = LowRankLinear.adapt(linear(), a, b, scaling=2.0, dropout=dropout)
    holder = nn.ModuleDict({"layer": linear()})
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=["layer"])
    peft.inject_adapter_in_model(config, holder, low_cpu_mem_usage=True)
    found = []
    for layer in (ours, holder["layer"]):
        for p in layer.parameters():
            p.data = p.data.to(masters if p.requires_grad else dtype)
        x = torch.empty(4, 512, n, dtype=dtype, device="meta", requires_grad=True)
        found.append(count(layer.train(), x))
    return found


@pytest.mark.parametrize(("m", "n"), [(4096, 1024), (1024, 4096)])
@pytest.mark.parametrize(("dtype", "masters"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fewer_kernels_and_bytes_than_peft(
    m: int, n: int, dtype: torch.dtype, masters: torch.dtype, dropout: float
) -> None:
    for ours, theirs in zip(*ours_and_pefts(m, n, dtype, masters, dropout), strict=True):
        assert ours.total < theirs.total, (ours.kernels, theirs.kernels)
        assert ours.read < theirs.read and ours.written < theirs.written


def test_a_layer_is_three_products_and_then_five() -> None:
    """Forward: W x, Bᵀ x, and A z into it. Backward: of x two, z, A and B."""
    forward, backward = ours_and_pefts(4096, 1024, BF16, BF16, 0.0)[0]
    assert forward.kernels == {"aten.mm": 2, "aten.addmm_": 1}
    assert backward.kernels == {"aten.mm": 2, "aten.addmm_": 3}
    tokens, m, n, size = 2048, 4096, 1024, 2
    wide = size * tokens
    # W x and A z write y, and A z reads it.
    assert forward.written - wide * 2 * m < 0.02 * wide * m
    assert forward.read - size * m * n - wide * (2 * n + m) < 0.05 * wide * m
    # y's gradient is read three times: for x, for z and for A.
    assert backward.read - size * m * n - wide * (3 * m + 2 * n) < 0.05 * wide * m
    with_masters = ours_and_pefts(4096, 1024, BF16, FP32, 0.0)[0]
    assert [x.kernels["aten._to_copy"] for x in with_masters] == [2, 2]  # A and B, their gradients
