"""Sends a model that only rank 0 has read to the other ranks, tensor by tensor."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError


def match_rank_0(model: nn.Module, world: World) -> None:
    """Give the model on every rank the dtypes of rank 0's model. Collective.

    The other ranks built the model from the config only. Some models keep a few tensors in fp32,
    and the config does not say so.

    Raises:
        UserError: on every rank, if names or shapes differ between ranks.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    known = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    if not world.agree(zlib.crc32(repr(known).encode())):
        raise UserError(
            "the model's files hold other tensors than its config.json says "
            "(tie_word_embeddings?): correct it, or train with --ds_config zero2"
        )
    dtypes = [[tensor.dtype for tensor in tensors.values()]]
    dist.broadcast_object_list(dtypes, src=0)
    for tensor, dtype in zip(tensors.values(), dtypes[0], strict=True):
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def broadcast_from_rank_0(tensor: Tensor, world: World) -> Tensor:
    """Rank 0's ``tensor`` on every rank's device. One broadcast.

    On other ranks, only the shape and dtype of ``tensor`` are used.
    """
    if world.is_main:
        whole = tensor.to(world.device).contiguous()
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
    dist.broadcast(whole, src=0)
    return whole


def broadcast_buffers(model: nn.Module, buffers: Mapping[str, Tensor], world: World) -> None:
    """Put rank 0's ``buffers`` into ``model`` on every rank's device. One broadcast per buffer.

    Args:
        buffers: {name: tensor}. On other ranks, only shapes and dtypes are used.
    """
    for name, buffer in buffers.items():
        holder, _, attribute = name.rpartition(".")
        model.get_submodule(holder)._buffers[attribute] = broadcast_from_rank_0(buffer, world)


def replaced_parameters(
    model: nn.Module, device: torch.device | str, *, keep: bool
) -> Iterator[nn.Parameter]:
    """Replace each parameter of ``model`` by a new one on ``device``, and yield it, once each.

    Tied parameters stay tied.

    Args:
        keep: whether the new parameters get the old values; else their values are undefined.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in moved:
                setattr(module, name, moved[parameter])
                continue
            data = parameter.detach()
            data = data.to(device) if keep else torch.empty_like(data, device=device)
            moved[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(module, name, moved[parameter])
            yield moved[parameter]
