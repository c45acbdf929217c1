"""A checkpoint is there whole or not at all, and damage is seen before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from scalora_dist.checkpoint import manifest
from scalora_dist.checkpoint.index import Index
from scalora_dist.checkpoint.manifest import (
    FileRecord,
    checkpoints,
    clear_leftovers,
    faults,
    prune,
    publish,
    read_manifest,
    remove,
    step_of,
    write_synced,
)
from scalora_dist.checkpoint.tensors import CheckpointTensors
from scalora_dist.errors import UserError
from tests.support.ranks import Ranks
from tests.support.workers import checkpoint as work

GetRanks = Callable[[int], Ranks]
RANK_FILE = "rank-00000.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(partial: Path, **contents: bytes) -> dict[str, FileRecord]:
    partial.mkdir(parents=True)
    contents["state.json"] = b"{}"
    return {name: write_synced(partial / name, data) for name, data in contents.items()}


# Files.


def test_a_published_checkpoint_is_sound(tmp_path: Path) -> None:
    files = written(tmp_path / "checkpoint-7.partial", a=b"12345", b=b"")
    publish(tmp_path / "checkpoint-7.partial", tmp_path / "checkpoint-7", files)
    assert names(tmp_path) == ["checkpoint-7"]
    read = read_manifest(tmp_path / "checkpoint-7")
    assert read == files
    assert faults(tmp_path / "checkpoint-7", files, list(files)) == []


@pytest.mark.parametrize("harm", ["short", "missing"])
def test_nothing_is_published_that_is_not_all_there(tmp_path: Path, harm: str) -> None:
    """Nor is the checkpoint of that name, from an earlier run, touched."""
    old = written(tmp_path / "old.partial", a=b"old")
    publish(tmp_path / "old.partial", tmp_path / "checkpoint-7", old)
    files = written(tmp_path / "checkpoint-7.partial", a=b"12345", b=b"123")
    if harm == "short":
        (tmp_path / "checkpoint-7.partial" / "b").write_bytes(b"12")
    else:
        (tmp_path / "checkpoint-7.partial" / "b").unlink()
    with pytest.raises(OSError, match="b"):
        publish(tmp_path / "checkpoint-7.partial", tmp_path / "checkpoint-7", files)
    assert read_manifest(tmp_path / "checkpoint-7") == old
    assert (tmp_path / "checkpoint-7" / "a").read_bytes() == b"old"


def test_a_checkpoint_appears_with_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the power goes before the rename, there is no checkpoint."""
    files = written(tmp_path / "checkpoint-7.partial", a=b"12345")

    def out_of_power(folder: Path) -> None:
        assert (tmp_path / "checkpoint-7.partial" / manifest.MANIFEST).exists()
        assert checkpoints(tmp_path) == []
        raise OSError("out of power")

    monkeypatch.setattr(manifest, "_sync_folder", out_of_power)
    with pytest.raises(OSError, match="out of power"):
        publish(tmp_path / "checkpoint-7.partial", tmp_path / "checkpoint-7", files)
    assert checkpoints(tmp_path) == []


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        files = written(folder / f"checkpoint-{step}.partial", a=b"1")
        publish(folder / f"checkpoint-{step}.partial", folder / f"checkpoint-{step}", files)


def test_checkpoints_are_found_by_number_not_by_name(tmp_path: Path) -> None:
    make(tmp_path, 9, 10, 100)
    for other in ("checkpoint-", "checkpoint-11.partial", "checkpoint-12.old", "checkpoint-x"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [100, 10, 9]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    make(tmp_path, 8, 9, 10, 100)
    prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    prune(tmp_path, 0)
    assert names(tmp_path) == []


def test_prune_does_not_count_what_a_run_went_back_behind(tmp_path: Path) -> None:
    """Otherwise a damaged newest one would push out every sound one."""
    make(tmp_path, 2, 3, 4, 6, 8)
    prune(tmp_path, 2, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_leftovers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 3)
    mine = ("checkpoint-4.partial.mine", "my-checkpoint-4.partial", "checkpoint-best.old")
    for name in ("checkpoint-4.partial", "checkpoint-2.old", *mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted(["checkpoint-3", *mine])


def test_a_deletion_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed
    remove(tmp_path / "checkpoint-3")
    assert names(tmp_path) == ["checkpoint-3.old"]
    assert checkpoints(tmp_path) == []
    monkeypatch.undo()
    remove(tmp_path / "checkpoint-3")  # not there any more: nothing to do
    clear_leftovers(tmp_path)
    assert names(tmp_path) == []


def rewrite_manifest(folder: Path, name: str, record: object) -> dict[str, FileRecord] | str:
    """List one file, as ``record``, and the state; what is read of that."""
    files = json.loads((folder / manifest.MANIFEST).read_text())["files"]
    listed = {name: record, "state.json": files["state.json"]}
    (folder / manifest.MANIFEST).write_text(json.dumps({"files": listed}))
    return read_manifest(folder)


def test_a_name_in_a_manifest_does_not_lead_out(tmp_path: Path) -> None:
    make(tmp_path, 3)
    (tmp_path / "secret").write_text("x")
    record = {"bytes": 1, "sha256": manifest.sha256(tmp_path / "secret")}
    for name in ("../secret", str(tmp_path / "secret")):
        files = rewrite_manifest(tmp_path / "checkpoint-3", name, record)
        assert not isinstance(files, str)
        assert faults(tmp_path / "checkpoint-3", files, list(files)) == ["secret is missing"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": [1]}', '{"files": {"a": ', "\xff"])
def test_a_damaged_manifest_is_told(tmp_path: Path, content: str) -> None:
    make(tmp_path, 3)
    (tmp_path / "checkpoint-3" / manifest.MANIFEST).write_bytes(content.encode("latin1"))
    assert read_manifest(tmp_path / "checkpoint-3") == "manifest.json is damaged"


@pytest.mark.parametrize("record", [{}, {"bytes": 1}, {"bytes": "1", "sha256": ""}, [], None])
def test_a_damaged_record_is_a_fault(tmp_path: Path, record: object) -> None:
    make(tmp_path, 3)
    files = rewrite_manifest(tmp_path / "checkpoint-3", "a", record)
    found = [files] if isinstance(files, str) else faults(tmp_path / "checkpoint-3", files, ["a"])
    assert len(found) == 1


def test_what_is_not_listed_was_not_checked(tmp_path: Path) -> None:
    """Tensors are read from every file in the folder."""
    make(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "rank-00007.safetensors").write_bytes(b"1")
    told = read_manifest(tmp_path / "checkpoint-3")
    assert isinstance(told, str) and "does not list rank-00007.safetensors" in told


# On real ranks.


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_two_ranks_save_any_number_reads(ranks: GetRanks, tmp_path: Path, size: int) -> None:
    """Three saves, two kept; what is saved is the moment of the call."""
    assert ranks(2).run(work.save, tmp_path, [2, 4, 6], 2) == [[None] * 3] * 2
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert names(tmp_path / "checkpoint-6") == sorted(
        [RANK_FILE, "rank-00001.safetensors", "index.json", "state.json", "manifest.json"]
    )
    assert manifest.read_state(tmp_path / "checkpoint-6") == {"step": 6, "rank": 0}
    for step in (4, 6):
        assert ranks(size).run(work.load, tmp_path, step) == [True] * size


def without_index(folder: Path) -> None:
    """Make a checkpoint one of the versions that wrote no index."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    del files["index.json"]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    (folder / "index.json").unlink()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_checkpoint_without_an_index_is_read(ranks: GetRanks, tmp_path: Path, size: int) -> None:
    ranks(2).run(work.save, tmp_path, [2])
    without_index(tmp_path / "checkpoint-2")
    assert ranks(size).run(work.load, tmp_path, 2) == [True] * size


def test_torch_reads_the_files(ranks: GetRanks, tmp_path: Path) -> None:
    """So do the versions that wrote no index, which read them by torch."""
    ranks(3).run(work.save, tmp_path, [2])
    state = {"wide": torch.zeros(work.NUMEL), "mine.2": torch.zeros(3, dtype=torch.int64)}
    reader = HuggingFaceStorageReader(str(tmp_path / "checkpoint-2"))
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["wide"], work.whole(2))
    assert state["mine.2"].tolist() == [2, 2, 2]


def test_a_rank_opens_only_the_files_that_it_needs(ranks: GetRanks, tmp_path: Path) -> None:
    """The same ranks again: each its own file. Of 4 ranks' files, two ranks share the second."""
    ranks(4).run(work.save, tmp_path, [2])
    assert ranks(4).run(work.opened, tmp_path, 2) == [[0], [1], [2], [3]]
    assert ranks(2).run(work.opened, tmp_path, 2) == [[0, 1], [1, 2, 3]]


@pytest.mark.parametrize("harm", ["dtype", "offset", "list"])
def test_a_damaged_header_without_an_index_is_told(
    ranks: GetRanks, tmp_path: Path, harm: str
) -> None:
    ranks(2).run(work.save, tmp_path, [2])
    folder = tmp_path / "checkpoint-2"
    without_index(folder)
    data = (folder / RANK_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if harm == "dtype":
        header["wide"]["dtype"] = "G32"
    elif harm == "offset":
        offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        offsets["wide"]["saved_offsets"] = ["0x"]
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)
    text = json.dumps([] if harm == "list" else header).encode()
    (folder / RANK_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ValueError, match=f"{RANK_FILE} has no readable header"):
        Index.read(folder)


def test_an_index_of_other_files_is_told(ranks: GetRanks, tmp_path: Path) -> None:
    ranks(2).run(work.save, tmp_path, [2])
    index = tmp_path / "checkpoint-2" / "index.json"
    index.write_text(index.read_text().replace("[[0,1],[0,501]]", "[[0,1],[0,502]]"))
    with pytest.raises(UserError, match="does not fit its files: wide of rank 0"):
        CheckpointTensors(tmp_path / "checkpoint-2").read("wide", torch.Size([work.NUMEL]))


@pytest.mark.parametrize("first", [True, False])
def test_after_a_failed_save_the_cuts_are_sent_again(
    ranks: GetRanks, tmp_path: Path, first: bool
) -> None:
    """Rank 0 fails while it reads what the ranks have sent."""
    assert ranks(2).run(work.save_after_lost_cuts, tmp_path, first) == [True, True]


def test_what_a_rank_cannot_describe_is_told(ranks: GetRanks, tmp_path: Path) -> None:
    """A dtype without a name: the other ranks do not wait for this one."""
    for outcome in ranks(2).run(work.save_a_strange_dtype, tmp_path):
        assert outcome is not None and "rank 1: KeyError: torch.complex64" in outcome
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("broken", "rank"),
    [("_make", 0), ("_write_file", 0), ("_write_file", 1), ("publish", 0), ("prune", 0)],
)
def test_a_save_that_fails_is_told_to_all(
    ranks: GetRanks, tmp_path: Path, broken: str, rank: int
) -> None:
    """The next save succeeds, and nothing is left of the failed one, which all ranks give up."""
    outcomes = ranks(2).run(work.save_with_a_failure, tmp_path, broken, rank)
    failure = f"checkpoint-4 could not be written (rank {rank}: No space left on device)"
    assert outcomes == [[None, failure, None]] * 2
    left = {"checkpoint-2", "checkpoint-6"} | ({"checkpoint-4"} if broken == "prune" else set())
    assert set(names(tmp_path)) == left
    assert ranks(2).run(work.load, tmp_path, 6) == [True, True]


def test_a_failure_that_no_one_foresaw_is_told_too(ranks: GetRanks, tmp_path: Path) -> None:
    outcomes = ranks(2).run(work.save_with_a_failure, tmp_path, "_write_file", 1, KeyError("oh"))
    told = "checkpoint-4 could not be written (rank 1: KeyError: 'oh')"
    assert outcomes == [[None, told, None]] * 2


def test_ranks_that_save_other_tensors_are_told(ranks: GetRanks, tmp_path: Path) -> None:
    failure = "rank 0: ValueError: rank 1 saves other tensors than rank 0"
    for outcome in ranks(2).run(work.save_other_tensors, tmp_path):
        assert outcome == f"checkpoint-2 could not be written ({failure})"
    assert names(tmp_path) == []


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int((len(data) - 1) * where)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, RANK_FILE),
    "truncated to nothing": (lambda path: path.write_bytes(b""), RANK_FILE),
    "a bit of a tensor": (lambda path: flip(path, 0.9), "rank-00001.safetensors"),
    "a bit of the header": (lambda path: flip(path, 0.01), RANK_FILE),
    "a bit of the state": (flip, "state.json"),
    "state truncated": (truncate, "state.json"),
    "missing": (Path.unlink, "rank-00001.safetensors"),
    "state missing": (Path.unlink, "state.json"),
    "a bit of the index": (flip, "index.json"),
    "index missing": (Path.unlink, "index.json"),
    "manifest missing": (Path.unlink, "manifest.json"),
    "manifest truncated": (truncate, "manifest.json"),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    ranks: GetRanks, tmp_path: Path, harm: str, size: int
) -> None:
    ranks(2).run(work.save, tmp_path, [2, 4])
    do, name = HARMS[harm]
    do(tmp_path / "checkpoint-4" / name)
    for found, warned in ranks(size).run(work.find, tmp_path, "latest"):
        assert found == "checkpoint-2"
        assert len(warned) == 1
        assert str(tmp_path / "checkpoint-4") in warned[0] and name in warned[0]
    named = str(tmp_path / "checkpoint-4")
    for refusal, _ in ranks(size).run(work.find, tmp_path, named):
        assert f"{named} cannot be used" in refusal
        assert name in refusal and "latest" in refusal and "\n" not in refusal


def test_every_single_bit_of_a_manifest_counts(ranks: GetRanks, tmp_path: Path) -> None:
    """A bit flipped anywhere in manifest.json either shows or changes nothing it says."""
    ranks(2).run(work.save, tmp_path, [2])
    folder = tmp_path / "checkpoint-2"
    sound, before = (folder / "manifest.json").read_bytes(), read_manifest(folder)
    assert not isinstance(before, str)
    missed = []
    for position in range(len(sound)):
        for bit in range(8):
            flipped = bytearray(sound)
            flipped[position] ^= 1 << bit
            (folder / "manifest.json").write_bytes(flipped)
            files = read_manifest(folder)
            if isinstance(files, str) or files == before:
                continue
            if not faults(folder, files, list(files)):
                missed.append((position, bit, bytes(flipped[position - 9 : position + 9])))
    assert not missed


def test_without_a_sound_one_latest_is_refused(ranks: GetRanks, tmp_path: Path) -> None:
    ranks(2).run(work.save, tmp_path, [2, 4])
    for step in (2, 4):
        truncate(tmp_path / f"checkpoint-{step}" / RANK_FILE)
    for refusal, warned in ranks(2).run(work.find, tmp_path, "latest"):
        assert "none of the 2 checkpoints" in refusal and "--output_dir" in refusal
        assert "\n" not in refusal
        assert len(warned) == 2


def test_without_any_checkpoint_latest_starts_at_the_beginning(
    ranks: GetRanks, tmp_path: Path
) -> None:
    assert ranks(2).run(work.find, tmp_path / "none", "latest") == [("", []), ("", [])]


@pytest.mark.parametrize("wanted", ["elsewhere", "checkpoint-4.partial", "."])
def test_what_is_no_checkpoint_is_refused(ranks: GetRanks, tmp_path: Path, wanted: str) -> None:
    refusal, _ = ranks(1).run(work.find, tmp_path, str(tmp_path / wanted))[0]
    assert "name a folder checkpoint-<step>" in refusal


@pytest.mark.parametrize("layout", ["whole", "rows", "mesh"])
@pytest.mark.parametrize("shape", [(37, 5), (6, 35), (3, 1), (1, 1), (8, 4)])
def test_every_element_is_written_once(
    ranks: GetRanks, layout: str, shape: tuple[int, int]
) -> None:
    """Whole on 4 ranks, cut into rows, or cut into rows by each row of a 2 × 2 mesh."""
    rows, cols = shape
    everyone = ranks(4).run(work.shares, rows, cols, layout)[0]
    assert {numel for *_, numel in everyone} == {rows * cols}
    covered = sorted(
        (offset + i, value) for offset, values, _ in everyone for i, value in enumerate(values)
    )
    assert covered == [(i, float(i)) for i in range(rows * cols)]
    if layout != "rows" and rows * cols >= 64:  # the copies' holders share the work
        sizes = [len(values) for _, values, _ in everyone]
        assert max(sizes) <= -(-rows * cols // 4) + cols
