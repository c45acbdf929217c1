"""How many kernels CUDA launches for one operator of torch: the rules of ``KernelCount``.

An operator is one launch unless a rule says otherwise. The rules are those of torch 2.13's own
source, ``aten/src/ATen/native`` and ``aten/src/ATen/native/cuda``. What a library launches inside
(cuBLAS, cuSOLVER, cuDNN) is one launch: the library decides by shape and GPU. The limits of
foreach are those of CUDA 12: torch built for CUDA 13 puts seven times as many tensors in a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from scalora_dist.core.arithmetic import ceil_div


def aten(names: str) -> frozenset[str]:
    """The names of torch's own operators, from a text with blanks between the names."""
    return frozenset(f"aten.{name}" for name in names.split())


# Operators that launch nothing, besides views: they allocate, or look at a tensor's description.
NOTHING = aten(
    "_pin_memory _reshape_alias _unsafe_view empty empty_like empty_permuted empty_strided "
    "is_pinned is_same_size lift new_empty new_empty_strided record_stream resize_ set_ "
    "sym_numel sym_size sym_stride sym_storage_offset"
)

# Operators that are several launches: written in terms of other operators inside ATen, where a
# dispatch mode does not see them, or made of several kernels of their own.
SEVERAL = {
    "aten.baddbmm": 2,  # a copy of the summand, then the product
    "aten.constant_pad_nd": 2,  # fill, then a copy into the middle
    "aten.diag_embed": 2,  # zeros, then a copy to the diagonal
    "aten.embedding_dense_backward": 2,  # zeros, then sums; with sorted indices even more
    "aten.equal": 3,  # eq, all, a copy to the host
    "aten.eye": 2,  # zeros, then the diagonal
    "aten.masked_fill": 2,  # clone, then masked_fill_
    "aten.masked_select": 5,  # nonzero, then index
    "aten.native_layer_norm_backward": 2,  # of the input, then of weight and bias
    "aten._fused_rms_norm_backward": 2,  # likewise
    "aten.nll_loss_backward": 2,  # zeros, then the targets
    "aten.nonzero": 4,  # count (2), a copy of the count to the host, write
    "aten.repeat_interleave": 3,  # cumulative sum (2), then the indices
    "aten.scatter": 2,  # clone, then scatter_
    "aten.scatter_add": 2,
    "aten.index_add": 2,
    "aten.select_backward": 2,  # zeros, then a copy
    "aten.slice_backward": 2,
    "aten.sort": 8,  # CUB's radix sort of long rows: a histogram, a pass per digit, the indices
    "aten.topk": 3,  # select, gather, sort
    # Flash attention's backward: a product with the output, the gradients, a cast of q's gradient.
    "aten._scaled_dot_product_flash_attention_backward": 3,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "aten._scaled_dot_product_efficient_attention_backward": 3,
    "aten._scaled_dot_product_cudnn_attention_backward": 3,
}

CAT_BATCH = 128  # tensors of one launch of cat: CAT_ARRAY_BATCH_SIZE
CAT_BATCH_STRIDED = 64  # where a tensor is not contiguous
CAT_DIMENSIONS = 4  # cat copies tensors of more dimensions one by one
CHUNK = 65536  # elements of one block of a foreach launch: kChunkSize
CHUNKS = 320  # blocks of one launch: depth_to_max_blocks
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # per list, by number of lists
TENSORS_SCALAR_LIST = {**TENSORS, 1: 96}  # each tensor has a number of its own

# Number of lists that these operators read and write. They launch like foreach.
FUSED_LISTS = {
    "aten._fused_adam_": 4,
    "aten._fused_adamw_": 4,
    "aten._fused_sgd_": 2,
    "aten._amp_foreach_non_finite_check_and_unscale_": 1,
}


def launches(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """The launches of one call of an operator that is not a view.

    Args:
        name: the operator's name without its overload, such as "aten.mm".
        args: its positional arguments.
        kwargs: its named arguments.
        out: its result.
    """
    if name in NOTHING:
        return 0
    if name in ("aten.cat", "aten.stack"):
        return cat_launches(args[0], new_dimensions=int(name == "aten.stack"))
    if name.startswith("aten._foreach_") or name in FUSED_LISTS:
        return _foreach(name, args, out)
    if rule := _BY_ARGUMENTS.get(name):
        return rule(args, kwargs)
    return SEVERAL.get(name, 1)


def cat_launches(tensors: Sequence[Tensor], new_dimensions: int = 0) -> int:
    """Launches of ``torch.cat``: of batches of tensors; one by one where it cannot batch them."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if len(tensors) < 2:
        return len(tensors)
    alike = len({tensor.dtype for tensor in tensors}) == 1
    small = sum(tensor.numel() for tensor in tensors) < 2**31
    if not alike or not small or tensors[0].dim() + new_dimensions > CAT_DIMENSIONS:
        return len(tensors)
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    return ceil_div(len(tensors), CAT_BATCH if contiguous else CAT_BATCH_STRIDED)


def foreach_launches(
    lists: Sequence[Sequence[Tensor]],
    *,
    depth: int | None = None,
    mixed: bool = False,
    scalars: Sequence[Any] = (),
) -> int:
    """Launches of an operator on lists of tensors.

    CUDA puts many tensors in one launch if all have one device and one dtype, are dense, and have
    the same shape and strides in each list. Else it launches once per tensor.

    Args:
        lists: the lists that the operator reads, all of one length.
        depth: number of lists that a kernel reads and writes; None: as many as ``lists``.
        mixed: whether the lists may differ from one another in dtype.
        scalars: numbers: one for all tensors or one for each.
    """
    first = lists[0]
    filled = [tensor.numel() for tensor in first if tensor.numel()]
    if not _fast(lists, mixed, scalars):
        return len(filled)
    limits = TENSORS_SCALAR_LIST if len(scalars) > 1 else TENSORS
    most = limits[min(depth or len(lists), 5)]
    count = tensors = blocks = 0
    for numel in filled:  # as multi_tensor_apply fills its launches
        tensors += 1
        chunks = ceil_div(numel, CHUNK)
        full, rest = divmod(blocks + chunks, CHUNKS)
        count += full
        if full:
            blocks, tensors = rest, int(rest > 0)
        else:
            blocks = rest
        if tensors == most and blocks:
            count, blocks, tensors = count + 1, 0, 0
    return count + int(blocks > 0)


def _fast(lists: Sequence[Sequence[Tensor]], mixed: bool, scalars: Sequence[Any]) -> bool:
    """Whether the lists go CUDA's fast way: ``can_use_fast_route`` in ATen/native/ForeachUtils."""
    device, dtype = lists[0][0].device, lists[0][0].dtype
    for tensors in lists:
        if not mixed and tensors[0].dtype != dtype:
            return False
        for tensor, other in zip(tensors, lists[0], strict=True):
            if tensor.device != device or tensor.dtype != tensors[0].dtype:
                return False
            if tensor.shape != other.shape or not _dense(tensor):
                return False
            strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
            if any(size != 1 and mine != its for size, mine, its in strides):
                return False
    return dtype.is_floating_point or not any(isinstance(number, float) for number in scalars)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, in some order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _foreach(name: str, args: Sequence[Any], out: Any) -> int:
    lists = [arg for arg in args if _tensors(arg)]
    if count := FUSED_LISTS.get(name):
        return foreach_launches(lists[:count], mixed=True)
    scalars = [leaf for arg in args if not _tensors(arg) for leaf in tree_leaves(arg)]
    scalars = [x for x in scalars if isinstance(x, (int, float)) and not isinstance(x, bool)]
    written = 0 if name.endswith("_") else 1
    if name in ("aten._foreach_norm", "aten._foreach_max"):
        return foreach_launches(lists, depth=1) + 2  # zeros before, one kernel that sums chunks
    if name == "aten._foreach_copy_":
        return foreach_launches(lists, mixed=True)
    return foreach_launches(lists, depth=len(lists) + written, scalars=scalars)


def _tensors(arg: Any) -> bool:
    return isinstance(arg, (list, tuple)) and bool(arg) and isinstance(arg[0], Tensor)


def _addmm(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """cuBLAS adds a bias of one dimension itself; it first copies another summand."""
    return 1 if args[0].dim() == 1 or kwargs.get("beta", 1) == 0 else 2


def _index_put(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Masks become indices first, unless one number is written. Sums sort the indices."""
    masks = masks_of(args[1])
    if masks and args[2].numel() == 1:
        return 1
    accumulate = kwargs.get("accumulate", len(args) > 3 and args[3])
    return SEVERAL["aten.nonzero"] * len(masks) + (SEVERAL["aten.sort"] + 2 if accumulate else 1)


def _index(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return SEVERAL["aten.nonzero"] * len(masks_of(args[1])) + 1


def masks_of(indices: Sequence[Tensor | None]) -> list[Tensor]:
    """The indices that are masks: each needs a ``nonzero``."""
    return [x for x in indices if x is not None and x.dtype in (torch.bool, torch.uint8)]


_BY_ARGUMENTS: dict[str, Callable[[Sequence[Any], dict[str, Any]], int]] = {
    "aten.addmm": _addmm,
    "aten.index": _index,
    "aten.index_put": lambda args, kwargs: 1 + _index_put(args, kwargs),  # clone, then index_put_
    "aten.index_put_": _index_put,
    # FSDP's own operators. The first copies all shards into the buffer by one foreach copy.
    "fsdp.all_gather_copy_in": lambda args, kwargs: foreach_launches([args[0]], depth=2),
}
