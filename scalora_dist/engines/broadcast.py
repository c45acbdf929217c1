"""A model that rank 0 alone has read: sent to the others tensor by tensor."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError


def match_rank_0(model: nn.Module, world: World) -> None:
    """Have ranks that know only the config expect what rank 0 sends, in its dtypes.

    Some models keep a few of their tensors in fp32, which a config does not tell.

    Raises:
        UserError: on every rank, where names or shapes differ.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    known = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    if not world.agree(zlib.crc32(repr(known).encode())):
        raise UserError(
            "the model's files hold other tensors than its config.json says "
            "(tie_word_embeddings?): correct it, or train with --ds_config ds_configs/zero2.json"
        )
    dtypes = [[tensor.dtype for tensor in tensors.values()]]
    dist.broadcast_object_list(dtypes, src=0)
    for tensor, dtype in zip(tensors.values(), dtypes[0], strict=True):
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def broadcast_from_rank_0(tensor: Tensor, world: World) -> Tensor:
    """Rank 0's ``tensor`` on every rank's device; elsewhere only its shape and dtype count."""
    if world.is_main:
        whole = tensor.to(world.device)
    else:
        whole = torch.empty_like(tensor, device=world.device)
    dist.broadcast(whole, src=0)
    return whole


def broadcast_buffers(model: nn.Module, buffers: Mapping[str, Tensor], world: World) -> None:
    """Put rank 0's ``buffers``, {name: tensor}, into ``model`` on every rank's device."""
    for name, buffer in buffers.items():
        holder, _, attribute = name.rpartition(".")
        model.get_submodule(holder)._buffers[attribute] = broadcast_from_rank_0(buffer, world)


def replaced_parameters(
    model: nn.Module, device: torch.device | str, *, keep: bool
) -> Iterator[nn.Parameter]:
    """Each parameter of ``model`` once, as another one on ``device`` that takes its place.

    Tied ones stay tied.

    Args:
        keep: its values; else they are not set.
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
