"""4-bit layers against their definition: codes, sizes and products, on shards too."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.errors import UserError
from scalora_dist.layers.adapted_linear import LowRankLinear
from scalora_dist.layers.fourbit_linear import BLOCK, FourBit, FourBitLinear, check_products
from tests.support.refusals import one_sentence

bnb = pytest.importorskip("bitsandbytes.functional")

# (m, n): a multiple of the block, rows that are none, an odd number of elements, less than a block.
SHAPES = [(64, 128), (50, 96), (33, 48), (31, 24), (35, 37), (5, 7)]
NESTED = [True, False]


def made(
    m: int, n: int, *, double_quant: bool = True, storage: torch.dtype = torch.uint8
) -> tuple[Tensor, FourBitLinear]:
    """A dense W (m, n) and the layer that holds it in 4 bits."""
    torch.manual_seed(0)
    linear = nn.Linear(n, m)
    dense = linear.weight.detach().clone()
    settings = FourBit("nf4", double_quant, torch.float32, storage)
    return dense, FourBitLinear.quantize(linear, settings)


def by_hand(layer: FourBitLinear) -> Tensor:
    """W from codes, the table of NF4 numbers and the sizes, read from bytes by their layout."""
    m, n = layer.out_features, layer.in_features
    codes = layer.weight.detach().view(torch.uint8).flatten()
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: m * n].long()
    numbers = bnb.get_4bit_type("nf4", device="cpu")[nibbles]
    blocks = math.ceil(m * n / BLOCK)
    if layer.fourbit.double_quant:
        offset, *nested = layer.sizes[:-blocks].view(torch.float32)
        table = bnb.create_dynamic_map()
        sizes = table[layer.sizes[-blocks:].long()]
        sizes = sizes * torch.stack(nested).repeat_interleave(256)[:blocks] + offset
    else:
        sizes = layer.sizes.view(torch.float32)
    return (numbers * sizes.repeat_interleave(BLOCK)[: m * n]).view(m, n)


@pytest.mark.floors
@pytest.mark.parametrize("double_quant", NESTED)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_numbers_are_what_codes_and_sizes_say(m: int, n: int, double_quant: bool) -> None:
    dense, layer = made(m, n, double_quant=double_quant)
    held = layer.dense(layer.weight, torch.float32)
    torch.testing.assert_close(held, by_hand(layer), rtol=1e-6, atol=1e-7)
    # A block's numbers lie within its size; NF4's widest gap is 0.304 of it (between -1 and -0.70).
    assert (held - dense).norm() < 0.12 * dense.norm()


def test_bytes_per_weight() -> None:
    """Half a byte of codes; sizes of 8 bits a block of 64, and 32 a block of 256 of those."""
    _, layer = made(512, 512)
    assert layer.weight.nbytes == 512 * 512 // 2
    assert layer.sizes.nbytes == 4 + 4 * 16 + 4096
    _, single = made(512, 512, double_quant=False)
    assert single.sizes.nbytes == 4 * 4096


@pytest.mark.floors
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_codes_are_the_same_bits_in_any_storage(m: int, n: int, storage: torch.dtype) -> None:
    """Zeros fill up the last element."""
    _, layer = made(m, n, storage=storage)
    _, bytes_ = made(m, n)
    assert layer.weight.dtype == storage
    codes, right = layer.weight.view(torch.uint8).flatten(), bytes_.weight.flatten()
    assert torch.equal(codes[: len(right)], right) and not codes[len(right) :].any()
    assert torch.equal(layer.dense(layer.weight, torch.float32), by_hand(bytes_))


@pytest.mark.floors
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_product_and_its_gradient(m: int, n: int) -> None:
    _, layer = made(m, n)
    assert layer.bias is not None
    x = torch.randn(3, 2, n, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    dense = by_hand(layer)
    torch.testing.assert_close(y, F.linear(x, dense, layer.bias))
    torch.testing.assert_close(grad_x, grad_y @ dense)


def test_what_the_product_keeps_is_the_codes() -> None:
    """Not the dense W, nor a copy: an engine can free them between forward and backward."""
    _, layer = made(64, 128)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(2, 128, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr()]


def test_another_compute_dtype() -> None:
    _, layer = made(64, 128)
    layer.fourbit = FourBit("nf4", True, torch.bfloat16, torch.uint8)
    x = torch.randn(4, 128)
    expected = F.linear(x.bfloat16(), by_hand(layer).bfloat16(), layer.bias.bfloat16())
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), expected.float())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_shard_of_codes_is_a_shard_of_numbers(
    m: int, n: int, world: int, storage: torch.dtype
) -> None:
    """Ranges that begin and end inside a block, some of them empty."""
    _, layer = made(m, n, storage=storage)
    codes = layer.weight.detach().view(-1)
    share = -(-len(codes) // world)
    found: list[Tensor] = []
    for rank in range(world):
        start, end = (min(bound, len(codes)) for bound in (rank * share, (rank + 1) * share))
        group = object()
        shard = FlatShard(codes[start:end].clone(), start, (len(codes), 1), group)  # type: ignore[arg-type]
        numbers = layer.dense_shard(shard)
        assert (numbers.shape, numbers.group) == ((m, n), group)
        assert numbers.offset == sum(map(len, found))
        found.append(numbers.local)
    assert torch.equal(torch.cat(found).view(m, n), layer.dense(layer.weight, torch.float32))


def test_a_cast_of_the_model_leaves_codes_and_sizes() -> None:
    _, layer = made(50, 96)
    before = layer.dense(layer.weight, torch.float32)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dense(layer.weight, torch.float32), before)
    assert layer.bias.dtype == torch.bfloat16


def test_sizes_do_not_depend_on_threads() -> None:
    """Checksums of a base are compared between runs on other numbers of ranks."""
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(made(1000, 777)[1].sizes)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_method_s_layer_on_four_bits() -> None:
    _, base = made(50, 96)
    dense, (a, b) = by_hand(base), (torch.randn(50, 3), torch.randn(96, 3))
    layer = LowRankLinear.adapt(base, a, b, scaling=2.0, dropout=0.0)
    assert isinstance(layer, LowRankLinear) and isinstance(layer, FourBitLinear)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "A", "B"]
    x = torch.randn(5, 96)
    expected = F.linear(x, dense + 2 * a @ b.T, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def checked() -> str:
    settings = FourBit("nf4", True, torch.float32, torch.uint8)
    with pytest.raises(UserError) as error:
        check_products(settings, torch.device("cpu"))
    return one_sentence(error)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'scalora_dist[quant]'" in checked()


def test_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("bitsandbytes::quantize_4bit is not implemented\nfor 'xpu'")

    monkeypatch.setattr(bnb, "quantize_4bit", missing)
    sentence = checked()
    assert "no 4-bit kernels for cpu" in sentence and "not implemented" in sentence
