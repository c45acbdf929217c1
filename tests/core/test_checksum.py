"""A checksum sees every bit and every order, and does not see how it was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scalora_dist.core.checksum import BASE, bits, checksums

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16, torch.uint8]


def random(dtype: torch.dtype, numel: int = 37) -> Tensor:
    """Any bits, NaN among them."""
    generator = torch.Generator().manual_seed(0)
    size = numel * torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype)


def checksum(tensor: Tensor, **settings: int) -> int:
    return int(checksums([tensor], **settings)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 2**20])
def test_it_is_the_polynomial_of_the_bits(dtype: torch.dtype, chunk: int) -> None:
    """Against Python's integers, whatever the size of a chunk."""
    tensor = random(dtype)
    expected = sum(value * pow(BASE, i) for i, value in enumerate(bits(tensor).tolist()))
    assert checksum(tensor, chunk=chunk) % 2**64 == expected % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_sees_every_single_bit(dtype: torch.dtype) -> None:
    tensor = random(dtype)
    seen = {checksum(tensor)}
    for place in range(tensor.nbytes):
        for bit in range(8):
            flipped = tensor.clone()
            flipped.view(torch.uint8)[place] ^= 1 << bit
            seen.add(checksum(flipped, chunk=7))
    assert len(seen) == 1 + 8 * tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_sees_two_elements_change_places(dtype: torch.dtype) -> None:
    tensor = random(dtype)
    before = checksum(tensor)
    for i in range(len(tensor)):
        for j in range(i):
            swapped = tensor.clone()
            swapped[[i, j]] = tensor[[j, i]]
            same = torch.equal(swapped.view(torch.uint8), tensor.view(torch.uint8))
            assert (checksum(swapped) == before) == same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_sees_a_sign_change_places(dtype: torch.dtype) -> None:
    """The highest bit is the hardest for a sum modulo a power of 2, at distances of powers of 2."""
    tensor = torch.ones(2**12, dtype=dtype)
    seen = set()
    for k in range(13):
        tensor[2**k - 1] = -1
        seen.add(checksum(tensor))
        tensor[2**k - 1] = 1
    assert len(seen) == 13


def test_the_sign_of_zero_and_the_payload_of_nan_count() -> None:
    zero = torch.zeros(3)
    assert checksum(zero) != checksum(-zero)
    nans = [
        torch.tensor([bits, 5], dtype=torch.int16).view(torch.bfloat16) for bits in (32704, 32705)
    ]
    assert all(nan[0].isnan() for nan in nans)
    assert checksum(nans[0]) == checksum(nans[0].clone()) != checksum(nans[1])


def test_it_never_widens_more_than_a_chunk() -> None:
    """int64 takes four times the memory of a 16-bit weight."""
    widest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal widest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.int64:
                widest = max(widest, result.numel())
            return result

    with Watch():
        checksums([torch.ones(10_000, dtype=torch.bfloat16)], chunk=1000)
    assert widest == 1000


def test_many_tensors_at_once() -> None:
    """Each by itself, an empty one and views of one buffer at any offset among them."""
    buffer = random(torch.bfloat16, 1000)
    tensors = [buffer[7:500], buffer[:0], random(torch.float32), buffer[500:]]
    expected = [checksum(tensor.clone()) for tensor in tensors]
    assert checksums(tensors).tolist() == expected
    assert checksums(tensors, chunk=64).tolist() == expected
    assert len(set(expected)) == 4 and expected[1] == 0
    assert checksums([]).tolist() == []
