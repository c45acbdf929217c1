"""An index says where each element of each tensor is, however the ranks cut the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scalora_dist.checkpoint.cuts import Cuts, checksum, index_of
from scalora_dist.checkpoint.index import Index
from scalora_dist.checkpoint.parts import FlatPart
from tools.time_checkpoint_host import SimulatedRanks

SHARED = {"a": ("F32", 12), "b": ("F32", 12), "c": ("BF16", 12), "d": ("F32", 5), "e": ("F32", 1)}


def cuts(*ranges: list[tuple[int, int]], known: str = checksum(SHARED)) -> list[Cuts]:
    """What each rank saves of ``SHARED``: (first element, number of elements)."""
    return [
        Cuts(known, np.array(held, dtype=np.int64), {f"own.{rank}": ("U8", 3)})
        for rank, held in enumerate(ranges)
    ]


TWO = cuts(
    [(0, 7), (0, 7), (0, 7), (0, 0), (0, 1)],
    [(7, 5), (7, 5), (7, 5), (0, 5), (1, 0)],
)


def test_tensors_that_are_cut_alike_share_an_entry() -> None:
    index = index_of(SHARED, TWO)
    assert [index.tensors[x].cut for x in "abcde"] == [0, 0, 0, 1, 2]
    assert index.tensors["c"][:2] == ("BF16", 12)
    assert len(index.cuts) == 5  # with each rank's own
    assert list(index.pieces("a", 0, 12)) == [(0, 7, 0), (7, 12, 1)]
    assert list(index.pieces("a", 7, 12)) == [(7, 12, 1)]
    assert list(index.pieces("a", 6, 8)) == [(0, 7, 0), (7, 12, 1)]
    assert list(index.pieces("a", 7, 7)) == []
    assert list(index.pieces("d", 0, 5)) == [(0, 5, 1)]
    assert list(index.pieces("own.1", 0, 3)) == [(0, 3, 1)]
    assert Index.decode(index.encode()) == index


@pytest.mark.parametrize("seed", range(20))
def test_each_element_is_found_in_the_file_that_has_it(seed: int) -> None:
    """Of random sizes on 1 to 9 ranks, whose order is not that of their ranges."""
    draw = np.random.default_rng(seed)
    size = int(draw.integers(1, 10))
    shared = {f"t{i}": ("F32", int(draw.integers(1, 40))) for i in range(6)}
    held = np.zeros((size, len(shared), 2), dtype=np.int64)
    owner: dict[tuple[str, int], tuple[int, int, int]] = {}
    for i, (name, (_, numel)) in enumerate(shared.items()):
        borders = np.sort(draw.integers(0, numel + 1, size - 1))
        starts, ends = np.array([0, *borders]), np.array([*borders, numel])
        for rank, start, end in zip(draw.permutation(size), starts, ends, strict=True):
            held[rank, i] = start, end - start
            owner |= {(name, x): (start, end, rank) for x in range(start, end)}
    index = Index.of(shared, list(held), [])
    for name, (_, numel) in shared.items():
        for start in range(numel):
            for end in range(start + 1, numel + 1):
                expected = list(dict.fromkeys(owner[name, x] for x in range(start, end)))
                assert list(index.pieces(name, start, end)) == expected


def test_cuts_travel_as_text() -> None:
    parts = {
        "z": FlatPart(torch.zeros(3, dtype=torch.bfloat16), 4, 9),
        "a": FlatPart(torch.zeros(0), 7, 7),
    }
    sent = Cuts.of(parts, {"mine": FlatPart(torch.zeros(2, dtype=torch.uint8), 0, 2)})
    came = Cuts.decode(sent.encode())
    assert came.shared == checksum({"a": ("F32", 7), "z": ("BF16", 9)})
    assert came.ranges.tolist() == sent.ranges.tolist() == [[7, 0], [4, 3]]
    assert came.own == {"mine": ("U8", 2)}


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        (cuts([(0, 12)] * 3 + [(0, 5), (0, 1)], [(0, 0)] * 4 + [(0, 1)]), "parts of e"),
        (cuts([(0, 12)] * 3 + [(0, 4), (0, 1)]), "parts of d have 4 of its 5"),
        (cuts([(0, 12)] * 3 + [(1, 4), (0, 1)]), "parts of d do not follow"),
        (cuts([(0, 12)] * 3 + [(0, 5), (0, 0)]), "parts of e have 0 of its 1"),
        ([TWO[0], *cuts([(0, 0)] * 5, known="other")], "rank 1 saves other tensors"),
    ],
)
def test_what_is_not_saved_once_and_in_full_is_refused(ranks: list[Cuts], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        index_of(SHARED, ranks)


def one_tensor(cut: object = ((0, 1), (0, 5)), **changed: object) -> str:
    """The text of an index of one tensor with 10 elements."""
    entry = {"dtype": "F32", "numel": 10, "cut": 0} | changed
    return json.dumps({"tensors": {"a": list(entry.values())}, "cuts": [cut]})


def test_a_sound_index_is_read(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(one_tensor())
    assert list(Index.read(tmp_path).pieces("a", 0, 10)) == [(0, 5, 0), (5, 10, 1)]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"tensors": {}, "cuts": [1]}', '{"tensors": {"a": [1]}, "cuts": []}'),
        *(one_tensor(dtype="F9"), one_tensor(dtype=["F32"])),
        *(one_tensor(numel=5), one_tensor(numel="10"), one_tensor(numel=10.5), one_tensor(numel=0)),
        *(one_tensor(cut=1), one_tensor(cut=-1), one_tensor(cut=0.0), one_tensor(cut="0")),
        *(one_tensor(((), ())), one_tensor(((0,), (3,))), one_tensor(((0, 1), (0,)))),
        *(one_tensor(((0,), (0, 5))), one_tensor(((0, 1), (0, 0))), one_tensor(((0, 1), (5, 0)))),
        *(one_tensor(((0, -1), (0, 5))), one_tensor(((0, 1), (-5, 5)))),
        *(one_tensor(((0, "1"), (0, 5))), one_tensor(((0, True), (0, 5)))),
    ],
)
def test_an_index_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        Index.read(tmp_path)


def test_a_folder_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").mkdir()
    with pytest.raises(ValueError, match=r"index\.json cannot be read \(Is a directory\)"):
        Index.read(tmp_path)


def test_a_tensor_that_two_ranks_call_their_own_is_refused() -> None:
    mine: dict[str, tuple[str, int]] = {"mine": ("U8", 3)}
    ranks = [Cuts(cuts.shared, cuts.ranges, mine) for cuts in TWO]
    with pytest.raises(ValueError, match="mine is saved twice"):
        index_of(SHARED, ranks)
    with pytest.raises(ValueError, match="a is saved twice"):
        index_of(SHARED, [TWO[0], Cuts(TWO[1].shared, TWO[1].ranges, {"a": ("F32", 12)})])


def test_a_save_costs_rank_0_little_at_256_ranks(tmp_path: Path) -> None:
    """Gemma-3-12B's 336 projections. Names and cuts are sent once."""
    ranks = SimulatedRanks(256, "fsdp")
    first, later = (ranks.save(tmp_path / f"checkpoint-{i}", i, count=True) for i in (1, 2))
    assert first["python"] < 60_000
    assert later["python"] < 40_000
    assert first["messages"] <= 12 and later["messages"] <= 12
    assert first["bytes"] < 500e3
    assert later["bytes"] < 50e3
    index = (tmp_path / "checkpoint-2" / "index.json").read_bytes()
    assert len(index) < 250e3
    contents = json.loads(index)
    assert len(contents["tensors"]) == 336 * 8 + 256 * 4
    assert len(contents["cuts"]) < 20 + 256  # with each rank's random states
