"""Linear layers whose frozen W is stored in 4 bits: bitsandbytes' NF4 and FP4.

The flattened W is divided into blocks of 64. A block has one 4-bit code per element and one size,
its largest absolute value. Sizes are fp32, or with double quantization 8-bit codes, in blocks of
256 again (QLoRA, arXiv 2305.14314, section 3). The codes are a parameter, which engines shard. The
sizes are replicated: about 0.016 bytes per element, without double quantization 0.063.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.errors import UserError

BLOCK = 64  # elements of W that share one size
NESTED_BLOCK = 256  # sizes that share one fp32 size


@dataclass(frozen=True)
class FourBit:
    """How weights are stored in 4 bits.

    Attributes:
        quant_type: nf4 or fp4.
        double_quant: whether the blocks' sizes are quantized too.
        compute_dtype: dtype that W is dequantized to for a product; None: the input's.
        storage: dtype of the tensor that holds the codes; its bits are not numbers of that dtype.
    """

    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype | None
    storage: torch.dtype


class FourBitLinear(nn.Linear):
    """``y = W x + bias`` with a frozen W (m, n) in 4 bits. Only x gets a gradient.

    Attributes:
        fourbit: format of W.
        weight: codes, two per byte, (⌈m·n / (2·itemsize)⌉, 1) of ``fourbit.storage``, padded with
            zeros.
        sizes: bytes of the block sizes, uint8. With double quantization: an fp32 offset,
            ⌈blocks / 256⌉ fp32 and one byte per block; else one fp32 per block. They are bytes
            because an engine that casts a model to 16 bits does not cast bytes. Not in the state
            dict.
    """

    fourbit: FourBit
    sizes: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, fourbit: FourBit, codes: Tensor, sizes: Tensor) -> FourBitLinear:
        """Change ``linear`` to a FourBitLinear in place.

        Args:
            codes: bytes of the codes, in a tensor of any dtype.
            sizes: block sizes, uint8, see ``sizes`` of the class.
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
        """Quantize a dense ``linear`` and change it to a FourBitLinear in place."""
        codes, sizes = quantize(linear.weight.detach(), fourbit)
        return cls.of(linear, fourbit, codes, sizes)

    @classmethod
    def saved(
        cls, linear: nn.Linear, fourbit: FourBit, codes: Tensor, saved: Mapping[str, Tensor]
    ) -> FourBitLinear:
        """Change ``linear`` in place to one with the codes and sizes of a file of bitsandbytes.

        Args:
            codes: the codes, in a tensor of any dtype.
            saved: {key in the file, without the weight's own key before it: tensor}.
        """
        state = _bnb().QuantState.from_dict(dict(saved), device=codes.device)
        return cls.of(linear, fourbit, codes, _taken_sizes("a layer", state, fourbit))

    def forward(self, x: Tensor) -> Tensor:
        # A method may have changed the class; that class's forward then calls this one.
        return _Product.apply(x, self.weight, self)

    def product(self, x: Tensor, codes: Tensor) -> Tensor:
        """W x + bias without autograd, (…, n) → (…, m), from all the codes."""
        dtype = self.fourbit.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dense(codes, dtype), bias).to(x.dtype)

    def gradient(self, grad_y: Tensor, codes: Tensor) -> Tensor:
        """The gradient of x, (…, m) → (…, n), from all the codes."""
        dtype = self.fourbit.compute_dtype or grad_y.dtype
        return (grad_y.to(dtype) @ self.dense(codes, dtype)).to(grad_y.dtype)

    def dense(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """W (m, n) in ``dtype``, dequantized from all the codes."""
        m, n = self.out_features, self.in_features
        return self._values(codes, self.block_sizes(), dtype)[: m * n].view(m, n)

    def dense_shard(self, codes: FlatShard) -> FlatShard:
        """This rank's range of W, float32, from its range of the codes. No communication."""
        m, n = self.out_features, self.in_features
        per_code = 2 * codes.local.element_size()  # elements of W
        start = min(codes.offset * per_code, m * n)
        end = min(start + codes.local.numel() * per_code, m * n)
        blocks = slice(start // BLOCK, ceil_div(end, BLOCK))
        # A range may begin or end inside a block: zero codes fill the block and are removed later.
        head = start - blocks.start * BLOCK
        padding = (head // 2, -(head // 2 + codes.local.nbytes) % (BLOCK // 2))
        padded = F.pad(codes.local.view(torch.uint8), padding)
        # An engine that offloads keeps the codes on the CPU, and buffers on the device.
        sizes = self.block_sizes()[blocks].to(padded.device)
        values = self._values(padded, sizes, torch.float32)
        return FlatShard(values[head : head + end - start], start, (m, n), codes.group)

    def block_sizes(self) -> Tensor:
        """The largest absolute value in each block of W, (blocks,) float32."""
        if not self.fourbit.double_quant:
            return self.sizes.view(torch.float32)
        blocks = ceil_div(self.out_features * self.in_features, BLOCK)
        floats, codes = self.sizes.tensor_split([self.sizes.numel() - blocks])
        offset, nested = floats.view(torch.float32).tensor_split([1])
        dequantize, code = _bnb().dequantize_blockwise, _nested_code(codes)
        return dequantize(codes, absmax=nested, code=code, blocksize=NESTED_BLOCK) + offset

    def _values(self, codes: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized elements, 1-D, two for each byte of codes."""
        if not codes.numel():
            return torch.empty(0, dtype=dtype, device=codes.device)
        # As one row: on a CPU, bitsandbytes 0.50.2 dequantizes rows wrongly if their length is not
        # a multiple of the block.
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
    """``W x + bias``. Saves only the codes for the backward.

    bitsandbytes' own product saves a view of them. Under ZeRO-3 the full model would then stay
    gathered from the forward to the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.layer = layer
        return layer.product(x, codes)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        return ctx.layer.gradient(grad_y, codes), None, None


def quantize(weight: Tensor, fourbit: FourBit) -> tuple[Tensor, Tensor]:
    """(codes, sizes), uint8, of a dense W (m, n). The number of threads does not change them."""
    bnb = _bnb()
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=fourbit.quant_type)
    return codes, pack_sizes(state.absmax, fourbit)


def pack_sizes(absmax: Tensor, fourbit: FourBit) -> Tensor:
    """``FourBitLinear.sizes`` from the fp32 sizes of the blocks, (blocks,)."""
    if not fourbit.double_quant:
        return absmax.view(torch.uint8)
    # Like bitsandbytes, but with a mean that does not depend on the number of threads: checksums of
    # the base are compared between runs.
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
    """Change the linear layers of bitsandbytes in ``model`` to FourBitLinear, in place.

    Layers whose weight is on "meta" get codes and sizes of the right shapes there.

    Raises:
        UserError: no layer to quantize, a layer without a 4-bit product, or codes of another kind.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {name: x for name, x in model.named_modules() if isinstance(x, Linear4bit)}
    if not layers:
        raise UserError("--load_in_4bit finds no linear layer to quantize in this model")
    for name, layer in layers.items():
        # A bnb layer that was a Conv1D has a transposed weight, which would be exported so.
        if getattr(layer, "source_cls", None) is Conv1D:
            raise UserError(
                f"{name} is a Conv1D (GPT-2's transposed layer), for which there is no 4-bit "
                "product here: leave out --load_in_4bit"
            )
        weight: Any = layer.weight
        # Attributes that bitsandbytes added, among them a second, larger copy of the sizes.
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


def fourbit_weights(model: nn.Module) -> dict[str, FourBitLinear]:
    """{name of W: its 4-bit layer} of all 4-bit layers in ``model``."""
    layers = model.named_modules()
    return {f"{name}.weight": x for name, x in layers if isinstance(x, FourBitLinear)}


def check_products(fourbit: FourBit, device: torch.device) -> None:
    """Check the 4-bit kernels: quantize and dequantize a few numbers on ``device``.

    Raises:
        UserError: bitsandbytes is not installed, or has no working kernels for this device.
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
    """bitsandbytes' table of 8-bit codes, on the device of ``like``."""
    if like.device not in _codes:
        _codes[like.device] = _bnb().create_dynamic_map().to(like.device)
    return _codes[like.device]


def _bnb() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
