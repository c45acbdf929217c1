"""Large data sets are tokenized by several processes: the same files, the same errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data import shards, tokenize
from scalora_dist.data.tokenize import Tokenized, tokenize_examples
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import UserError
from tests.support.refusals import one_sentence

ROWS = [{"prompt": f"{i} + 1 =", "completion": "1" * (i % 40)} for i in range(2000)]
Tokenize = Callable[[int, list[dict[str, Any]]], Tokenized]


@pytest.fixture
def with_processes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Tokenize:
    """Tokenizes rows in shards of 8 KiB, by a number of processes that share a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(shards, "SHARD_BYTES", 8 << 10)

    def run(processes: int, rows: list[dict[str, Any]]) -> Tokenized:
        monkeypatch.setattr(shards, "cores", lambda: processes)
        return tokenize_examples(Dataset.from_list(rows), tokenizer, DataArguments())

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("cache/scalora_dist/*.arrow")}


def note_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Returns a function that tells the ids of the processes that tokenize from now on."""
    (folder / "processes").mkdir()
    convert = tokenize._tokenize_rows

    def noted(*args: Any, **kwargs: Any) -> Any:
        (folder / "processes" / str(os.getpid())).touch()
        return convert(*args, **kwargs)

    monkeypatch.setattr(tokenize, "_tokenize_rows", noted)
    return lambda: {path.name for path in (folder / "processes").iterdir()}


def test_any_number_of_processes_writes_the_same_files(
    with_processes: Tokenize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that a killed call has left out."""
    processes = note_processes(tmp_path, monkeypatch)
    alone = with_processes(1, ROWS)
    written, mine = files(tmp_path), str(os.getpid())
    assert len(written) > 4 and processes() == {mine}
    assert [row["row"] for row in alone.dataset] == [i for i in range(len(ROWS)) if i % 40]
    for file in list(written)[1:]:
        (tmp_path / "cache" / "scalora_dist" / file).unlink()
    again = with_processes(3, ROWS)
    assert files(tmp_path) == written and again.dropped == alone.dropped > 0
    assert again.dataset.to_list() == alone.dataset.to_list()
    assert len(processes()) == 4
    with_processes(8, ROWS)
    assert len(processes()) == 4, "the cache was not read"


def test_small_data_pays_for_no_process(
    with_processes: Tokenize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = note_processes(tmp_path, monkeypatch)
    with_processes(8, ROWS[:40])
    assert processes() == {str(os.getpid())} and len(files(tmp_path)) == 1


def test_the_first_bad_row_is_named_by_any_number_of_processes(with_processes: Tokenize) -> None:
    rows: list[dict[str, Any]] = [*ROWS]
    rows[700] = rows[1500] = {"prompt": None, "completion": "x"}
    said = []
    for processes in (1, 3):
        with pytest.raises(UserError) as error:
            with_processes(processes, rows)
        said.append(one_sentence(error))
    assert said[0] == said[1] and "row 701" in said[0]


def test_a_process_that_is_killed_ends_the_run_in_one_sentence(
    with_processes: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = os.getpid()

    def killed(*_: Any, **__: Any) -> None:
        assert os.getpid() != run
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(tokenize, "_tokenize_rows", killed)
    with pytest.raises(UserError) as error:
        with_processes(2, ROWS)
    assert "was killed" in one_sentence(error)


def test_a_stop_signal_to_all_processes_reaches_the_run_alone(
    with_processes: Tokenize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system signals all of them. While the run is held, they go on with it."""
    processes = note_processes(tmp_path, monkeypatch)

    def signal_all() -> None:
        while len(processes()) < 2:
            time.sleep(0.01)
        all_processes = (psutil.Process(), *psutil.Process().children())
        subprocess.run(["kill", "-TERM", *(str(each.pid) for each in all_processes)], check=True)

    with StopSignals() as signals:
        signals.hold()
        sender = threading.Thread(target=signal_all)
        sender.start()
        made = with_processes(2, ROWS)
        sender.join()
        assert signals.received == "SIGTERM" and len(made.dataset) == 1950
        signals.finish()


def test_no_process_outlives_the_run(
    with_processes: Tokenize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a shard may take long."""
    processes = note_processes(tmp_path, monkeypatch)
    monkeypatch.setattr(tokenize, "_hash", lambda _: time.sleep(600))
    run = multiprocessing.get_context("fork").Process(target=with_processes, args=(2, ROWS))
    run.start()
    while len(processes()) < 2:
        time.sleep(0.01)
    workers = [psutil.Process(int(each)) for each in processes()]
    run.kill()
    run.join()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
