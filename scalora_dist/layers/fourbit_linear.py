"""Linear layers whose frozen W is kept in 4 bits: bitsandbytes' NF4 and FP4.

W, flattened, is cut into blocks of 64; a block keeps one 4-bit code per element and its largest
size. Those sizes are fp32, or with double quantization 8-bit codes in blocks of 256 again (QLoRA,
arXiv 2305.14314, section 3). The codes are a parameter, which engines shard; the sizes, about
0.016 bytes per element, are replicated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.errors import UserError

BLOCK = 64  # elements of W that share a size
NESTED_BLOCK = 256  # sizes that share one of theirs


@dataclass(frozen=True)
class FourBit:
    """How weights are kept in 4 bits.

    Attributes:
        quant_type: nf4 or fp4.
        double_quant: whether the blocks' sizes are quantized too.
        compute_dtype: what W is dequantized to for a product; None: the input's.
        storage: the dtype of the tensor that holds the codes; its bits are not numbers.
    """

    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype | None
    storage: torch.dtype


class FourBitLinear(nn.Linear):
    """``y = W x + bias`` with W (m, n) in 4 bits, frozen; the gradient goes to x alone.

    Attributes:
        weight: the codes, two to a byte, (⌈m·n / (2·itemsize)⌉, 1) of ``fourbit.storage``; what is
            too many are zeros.
        sizes: uint8, the bytes of what goes with the codes: of double quantization an fp32 offset,
            ⌈blocks / 256⌉ fp32 and a byte per block; else an fp32 per block. As bytes, for an
            engine that casts a model to 16 bits leaves bytes alone. Not in the state dict.
    """

    fourbit: FourBit
    sizes: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, fourbit: FourBit, codes: Tensor, sizes: Tensor) -> FourBitLinear:
        """Turn ``linear`` into a FourBitLinear in place.

        Args:
            codes: their bytes, of any dtype.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.fourbit = fourbit
        size = fourbit.storage.itemsize
        padded = F.pad(codes.reshape(-1).view(torch.uint8), (0, -codes.nbytes % size))
        linear.weight = nn.Parameter(padded.view(fourbit.storage).view(-1, 1), requires_grad=False)
        linear.register_buffer("sizes", sizes, persistent=False)
        return linear

    @classmethod
    def quantize(cls, linear: nn.Linear, fourbit: FourBit) -> FourBitLinear:
        """Turn a dense ``linear`` into a FourBitLinear in place."""
        codes, sizes = quantize(linear.weight.detach(), fourbit)
        return cls.of(linear, fourbit, codes, sizes)

    def forward(self, x: Tensor) -> Tensor:
        # The class may be another one by now, whose forward calls this one.
        dtype = self.fourbit.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.weight, bias, self).to(x.dtype)

    def dense(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """W (m, n) in ``dtype`` from all the codes."""
        m, n = self.out_features, self.in_features
        return self._values(codes, self.block_sizes(), dtype)[: m * n].view(m, n)

    def dense_shard(self, codes: FlatShard) -> FlatShard:
        """This rank's range of W, float32, from its range of the codes; local, no message."""
        m, n = self.out_features, self.in_features
        per_code = 2 * codes.local.element_size()  # elements of W
        start = min(codes.offset * per_code, m * n)
        end = min(start + codes.local.numel() * per_code, m * n)
        blocks = slice(start // BLOCK, ceil_div(end, BLOCK))
        # Ranges need not begin with a block: the codes around are zeros that are cut off again.
        head = start - blocks.start * BLOCK
        padding = (head // 2, -(head // 2 + codes.local.nbytes) % (BLOCK // 2))
        padded = F.pad(codes.local.view(torch.uint8), padding)
        # An engine that offloads keeps the codes on the CPU, and buffers on the device.
        sizes = self.block_sizes()[blocks].to(padded.device)
        values = self._values(padded, sizes, torch.float32)
        return FlatShard(values[head : head + end - start], start, (m, n), codes.group)

    def block_sizes(self) -> Tensor:
        """The largest size in each block of W, (blocks,) float32."""
        if not self.fourbit.double_quant:
            return self.sizes.view(torch.float32)
        blocks = ceil_div(self.out_features * self.in_features, BLOCK)
        floats, codes = self.sizes.tensor_split([self.sizes.numel() - blocks])
        offset, nested = floats.view(torch.float32).tensor_split([1])
        dequantize, code = _bnb().dequantize_blockwise, _nested_code(codes)
        return dequantize(codes, absmax=nested, code=code, blocksize=NESTED_BLOCK) + offset

    def _values(self, codes: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
        """The elements that codes stand for, 1-D: two for each byte."""
        if not codes.numel():
            return torch.empty(0, dtype=dtype, device=codes.device)
        # As one row: bitsandbytes 0.50.2 dequantizes rows wrongly on a CPU where their length is no
        # multiple of the block.
        state = _bnb().QuantState(
            sizes,
            shape=torch.Size([2 * codes.nbytes]),
            blocksize=BLOCK,
            quant_type=self.fourbit.quant_type,
            dtype=dtype,
        )
        return _bnb().dequantize_4bit(codes.reshape(-1, 1), state).view(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.fourbit.quant_type}"


class _Product(torch.autograd.Function):
    """``W x + bias``, keeping nothing for the backward but the codes.

    bitsandbytes' own product keeps a view of them: under ZeRO-3 the whole model would stay gathered
    from the forward to the backward.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, codes: Tensor, bias: Tensor | None, layer: FourBitLinear
    ) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.layer = layer
        return F.linear(x, layer.dense(codes, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (codes,) = ctx.saved_tensors
        return grad_y @ ctx.layer.dense(codes, grad_y.dtype), None, None, None


def quantize(weight: Tensor, fourbit: FourBit) -> tuple[Tensor, Tensor]:
    """(codes, sizes), uint8, of a dense W (m, n), on however many threads."""
    bnb = _bnb()
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=fourbit.quant_type)
    return codes, pack_sizes(state.absmax, fourbit)


def pack_sizes(absmax: Tensor, fourbit: FourBit) -> Tensor:
    """``FourBitLinear.sizes`` from the fp32 size of each block."""
    if not fourbit.double_quant:
        return absmax.view(torch.uint8)
    # As bitsandbytes does, but with a mean that does not depend on how many threads add it up:
    # checksums of the base are compared between runs.
    offset = absmax.double().mean().float()
    code = _nested_code(absmax)
    codes, nested = _bnb().quantize_blockwise(absmax - offset, code=code, blocksize=NESTED_BLOCK)
    return _as_bytes(offset, nested.absmax, codes)


def _as_bytes(offset: Tensor, nested: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([offset.float().view(1).view(torch.uint8), nested.view(torch.uint8), codes])


def _empty(linear: nn.Linear, fourbit: FourBit) -> tuple[Tensor, Tensor]:
    """Codes and sizes of the right shapes, on "meta"."""
    numel = linear.out_features * linear.in_features
    blocks = ceil_div(numel, BLOCK)
    nested = 4 + 4 * ceil_div(blocks, NESTED_BLOCK) + blocks
    codes = torch.empty(ceil_div(numel, 2), dtype=torch.uint8, device="meta")
    size = nested if fourbit.double_quant else 4 * blocks
    return codes, torch.empty(size, dtype=torch.uint8, device="meta")


def take_over(model: nn.Module, fourbit: FourBit) -> None:
    """Turn the linear layers that bitsandbytes put into ``model`` into ours, in place.

    Layers whose weight is on "meta" get codes and sizes of the right shapes there.

    Raises:
        UserError: layers that have no 4-bit product, or codes of another kind.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {name: x for name, x in model.named_modules() if isinstance(x, Linear4bit)}
    if not layers:
        raise UserError("--load_in_4bit finds no linear layer to quantize in this model")
    for name, layer in layers.items():
        # Of a bnb layer that was a Conv1D the weight is transposed, and would be exported so.
        if getattr(layer, "source_cls", None) is Conv1D:
            raise UserError(
                f"{name} is a Conv1D (GPT-2's transposed layer), for which there is no 4-bit "
                "product here: leave out --load_in_4bit"
            )
        weight: Any = layer.weight
        # What bitsandbytes hung on its layer: a second, larger copy of the sizes among it.
        for name_of_its_own in vars(layer).keys() - vars(nn.Linear(1, 1)).keys():
            delattr(layer, name_of_its_own)
        if weight.is_meta:
            FourBitLinear.of(layer, fourbit, *_empty(layer, fourbit))
            continue
        state = weight.quant_state
        sizes = _taken_sizes(name, state, fourbit)
        FourBitLinear.of(layer, fourbit, weight.detach().as_subclass(Tensor), sizes)


def _taken_sizes(name: str, state: Any, fourbit: FourBit) -> Tensor:
    if state.blocksize != BLOCK or state.quant_type != fourbit.quant_type:
        raise UserError(
            f"{name} is quantized as {state.quant_type} in blocks of {state.blocksize}, not as "
            f"{fourbit.quant_type} in blocks of {BLOCK}: quantize the base with --load_in_4bit"
        )
    if not state.nested:
        return pack_sizes(state.absmax.float(), fourbit)
    nested = state.state2
    if nested.blocksize != NESTED_BLOCK or not torch.equal(nested.code, _nested_code(nested.code)):
        raise UserError(f"{name} has sizes of a kind that bitsandbytes >= 0.48 does not write")
    return _as_bytes(state.offset, nested.absmax, state.absmax)


def check_products(fourbit: FourBit, device: torch.device) -> None:
    """Quantize and dequantize a few numbers on ``device``.

    Raises:
        UserError: bitsandbytes is not installed, or has nothing for this device.
    """
    try:
        layer = FourBitLinear.quantize(nn.Linear(BLOCK, 1, bias=False, device=device), fourbit)
        broken = not bool(layer.dense(layer.weight, torch.float32).isfinite().all())
    except ImportError as error:
        raise UserError("4 bits need bitsandbytes: pip install 'scalora_dist[quant]'") from error
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"bitsandbytes has no 4-bit kernels for {device}: {reason}") from error
    if broken:
        raise UserError(f"bitsandbytes' 4-bit kernels do not work on {device}")


_codes: dict[torch.device, Tensor] = {}


def _nested_code(like: Tensor) -> Tensor:
    """bitsandbytes' 8-bit code on a tensor's device."""
    if like.device not in _codes:
        _codes[like.device] = _bnb().create_dynamic_map().to(like.device)
    return _codes[like.device]


def _bnb() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
