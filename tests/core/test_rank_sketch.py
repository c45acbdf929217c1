"""RankSketch against exact SVDs of the update it never forms, however the factors are cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scalora_dist.core.flat_shard import FlatShard
from scalora_dist.core.rank_sketch import RELATIVE_THRESHOLD, RankSketch, Spectrum
from scalora_dist.distributed.world import World
from tests.support.ranks import Ranks
from tests.support.workers import sketch as work

StartRanks = Callable[[int], Ranks]
ALONE = World(0, 1, 0, torch.device("cpu"), store=None)  # type: ignore[arg-type]
CASES = [
    pytest.param(world, cut, id=f"{cut}-{world}")
    for world in (1, 2, 3, 4)
    for cut in (None, "zero3", "fsdp2", "buffer", "backwards", "crumbs")
    if world > 1 or cut in (None, "zero3")
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On matrices this small, threads of a busy machine do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def whole(matrix: Tensor) -> FlatShard:
    return FlatShard(matrix.flatten(), 0, (matrix.shape[0], matrix.shape[1]))


def exact_spectrum(update: Tensor) -> tuple[int, np.ndarray]:
    """(rank by the shared threshold, singular values) in float64."""
    values = np.linalg.svd(update.double().numpy(), compute_uv=False)
    return int((values > RELATIVE_THRESHOLD * values[0]).sum()), values


def orthonormal(rows: int, cols: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, generator=random, dtype=torch.float64)).Q


def monitored(
    spectrum: Tensor, *, shape: tuple[int, int] = (160, 120), width: int, repeats: int = 1
) -> tuple[Spectrum, Tensor]:
    """(what the monitor reads, the exact update) of merges that add up to this spectrum.

    Each merge is of 8 columns, in no order of size; the last one is the present s·A Bᵀ.
    ``repeats`` merges each of them in so many parts.
    """
    (m, n), r = shape, 8
    count = len(spectrum)
    left, right = orthonormal(m, count, 1), orthonormal(n, count, 2)
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    monitor, update = None, torch.zeros(m, n, dtype=torch.float64)
    chunks = list(mixed.split(r))
    assert len(chunks[-1]) == r
    for i, columns in enumerate(chunks):
        a, b = left[:, columns].float(), right[:, columns].float()
        w = spectrum[columns]
        if i == len(chunks) - 1:  # the present's weight is one number: A's columns hold the rest
            a, w = (left[:, columns] * w / 4).float(), torch.full((r,), 4.0, dtype=torch.float64)
        update += (a.double() * w) @ b.double().T
        pair = [(whole(a), whole(b))]
        monitor = monitor or RankSketch(["layer"], pair, ALONE.device, width=width, seed=0)
        if i < len(chunks) - 1:
            for _ in range(repeats):
                monitor.add(pair, w[None] / repeats)
    assert monitor is not None
    (found,) = monitor.read(pair, [4.0])
    return found, update


# --- against exact SVDs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "count", "tolerance"), [(8, 0, 1e-5), (20, 0, 1e-5), (32, 0, 1e-5), (48, 1, 2e-4)]
)
def test_geometric_decay(rank: int, count: int, tolerance: float) -> None:
    """The threshold lies in the middle between the last one that counts and the next."""
    spectrum = 3e-4 * 10 ** (-3 * torch.arange(120).double() / (rank - 0.5))
    found, update = monitored(spectrum, width=64)
    true, values = exact_spectrum(update)
    assert true == rank
    assert abs(found.rank - true) <= count and not found.full
    np.testing.assert_allclose(found.values, values[:4], rtol=tolerance)


@pytest.mark.parametrize(("power", "count", "tolerance"), [(1.75, 3, 3e-3), (2.5, 1, 5e-4)])
def test_slow_decay(power: float, count: int, tolerance: float) -> None:
    """Tails that do not end: what lies outside the sketch blurs what lies inside a little."""
    found, update = monitored(torch.arange(1, 121).double() ** -power, width=64)
    true, values = exact_spectrum(update)
    assert abs(found.rank - true) <= count and not found.full
    np.testing.assert_allclose(found.values, values[:4], rtol=tolerance)


@pytest.mark.parametrize("repeats", [1, 200])
@pytest.mark.parametrize("rank", [8, 24, 56])
def test_low_rank_update_is_exact(rank: int, repeats: int) -> None:
    """Nothing spurious beside it, and rounding of many merges stays far below the threshold."""
    spectrum = 10 ** (-2.5 * torch.arange(rank).double() / rank)
    found, update = monitored(spectrum, width=64, repeats=repeats)
    true, values = exact_spectrum(update)
    assert found.rank == true == rank
    assert not found.full
    np.testing.assert_allclose(found.values, values[:4], rtol=1e-5)


@pytest.mark.parametrize("largest", [1e-12, 1e12])
def test_only_ratios_count(largest: float) -> None:
    spectrum = largest * 10 ** (-torch.arange(24).double() / 4)  # 12 or 13 above, the rest below
    found, update = monitored(spectrum, width=64)
    true, values = exact_spectrum(update)
    assert abs(found.rank - true) <= 1
    np.testing.assert_allclose(found.values, values[:4], rtol=1e-5)


@pytest.mark.parametrize("rank", [16, 24, 80])
def test_a_full_sketch_says_so(rank: int) -> None:
    found, _ = monitored(torch.linspace(1, 0.1, rank).double(), width=16)
    assert found.rank == 16 and found.full


def test_a_sketch_as_wide_as_the_matrix_is_never_full() -> None:
    found, update = monitored(torch.linspace(1, 0.1, 24).double(), shape=(40, 24), width=128)
    assert found.rank == exact_spectrum(update)[0] == 24
    assert not found.full


def test_no_update() -> None:
    a, b = torch.zeros(9, 2), torch.randn(3, 2)
    monitor = RankSketch(["layer"], [(whole(a), whole(b))], ALONE.device, seed=0)
    zero = Spectrum(rank=0, full=False, values=(0.0, 0.0, 0.0))
    assert monitor.read([(whole(a), whole(b))], [1.0]) == [zero]
    monitor.add([(whole(a), whole(b))], torch.ones(1, 2))
    assert monitor.read([(whole(a), whole(b))], [1.0]) == [zero]


# --- cut up over ranks ---------------------------------------------------------------------------


def check_against_exact(spectra: list[Spectrum]) -> None:
    for found, update in zip(spectra, work.exact(), strict=True):
        true, values = exact_spectrum(update)
        assert found.rank == true and not found.full
        np.testing.assert_allclose(found.values, values[:4], rtol=1e-5)


@pytest.mark.parametrize(("world", "cut"), CASES)
def test_however_the_factors_are_cut(ranks: StartRanks, world: int, cut: str | None) -> None:
    answers = ranks(world).run(work.watched, cut)
    check_against_exact(answers[0]["spectra"])
    assert all(answer["spectra"] == answers[0]["spectra"] for answer in answers)
    alone = work.watched(ALONE, None)
    for name, (shape, _, expected) in alone["sketches"].items():
        parts = [answer["sketches"][name] for answer in answers]
        if cut is None:
            parts = parts[:1]
        together, owners = torch.zeros(math.prod(shape)), torch.zeros(math.prod(shape))
        for part_shape, offset, local in parts:
            assert part_shape == shape
            assert offset % shape[1] == local.numel() % shape[1] == 0  # whole rows
            together[offset : offset + local.numel()] += local
            owners[offset : offset + local.numel()] += 1
        assert (owners == 1).all()
        assert (together - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(("world", "cut"), CASES)
def test_messages(ranks: StartRanks, world: int, cut: str | None) -> None:
    for answer in ranks(world).run(work.watched, cut):
        one = {} if cut is None else {"all_reduce": 1}
        assert answer["adds"] == [one] * work.MERGES
        layers = len(work.NAMES)
        assert answer["read"] == ({} if cut is None else {"all_reduce": layers + 2})


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "zero3"), (3, "buffer")), ((3, "crumbs"), (2, None)), ((2, None), (3, "zero3"))],
    ids=["2-to-3", "3-to-whole", "whole-to-3"],
)
def test_a_checkpoint_is_read_on_other_ranks(
    ranks: StartRanks,
    tmp_path: Path,
    before: tuple[int, str | None],
    after: tuple[int, str | None],
) -> None:
    ranks(before[0]).run(work.save, tmp_path, before[1])
    answers = ranks(after[0]).run(work.resume, tmp_path, after[1])
    check_against_exact(answers[0])
    assert all(answer == answers[0] for answer in answers)


def test_an_update_that_is_not_finite_is_reported_on_all_ranks(ranks: StartRanks) -> None:
    for bad, good in ranks(3).run(work.broken, "zero3"):
        assert bad.rank == 0 and all(math.isnan(value) for value in bad.values)
        assert good.rank == work.RANK


def test_test_matrices_differ_between_layers_and_seeds() -> None:
    factor = whole(torch.zeros(200, 2))
    pairs = [(factor, factor)] * 2
    probes = [
        side.probe
        for seed in (0, 1)
        for sides in RankSketch(["a", "b"], pairs, ALONE.device, width=8, seed=seed).layers
        for side in sides
    ]
    columns = torch.cat(probes, dim=1)
    gram = columns.T @ columns / 200
    assert (gram - torch.eye(len(gram))).abs().max() < 0.5  # about N(0, 1/200) off the diagonal
