"""Runs with --profile on two real ranks: what they leave, and that training is as without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalora_dist.profiling.memory import restart_peak
from scalora_dist.profiling.table import render_profile
from tests.support import runs, tiny_models, tiny_runs
from tests.support.workers import profile as profile_work

STEPS, WINDOW = 5, (3, 4)
RESCALE = ["grams", "solve", "gather", "merge", "scale"]
PARTS = ["rest", "data", "forward", "backward", *RESCALE, "optimizer"]
TIMES = ("profile", *tiny_runs.TIMINGS)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_task(tmp_path_factory.mktemp("task"))


def options(task: Path, output: Path, engine: str = "zero3", **others: Any) -> dict[str, Any]:
    return tiny_runs.options(task, output, engine, eval_size=None, max_steps=STEPS) | others


@pytest.fixture(scope="module")
def run(task: Path, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under ZeRO-3 with a checkpoint after step 2."""
    output = tmp_path_factory.mktemp("zero3") / "profiled"
    case = options(task, output, profile=True, peak_tflops=0.5, save_steps=2, save_total_limit=9)
    ranks(2).run(runs.run, case)
    return output


@pytest.fixture(scope="module")
def profiles(run: Path) -> list[dict[str, Any]]:
    return [line["profile"] for line in runs.metrics(run)]


def test_parts_add_up_to_the_step(run: Path, profiles: list[dict[str, Any]]) -> None:
    for line, profile in zip(runs.metrics(run), profiles, strict=True):
        parts, slowest = profile["parts"], profile["slowest"]
        assert list(parts) == list(slowest) == PARTS
        assert all(0 < parts[part] <= slowest[part] <= profile["step"] for part in PARTS)
        # The mean over ranks, and the rank that took longest.
        assert sum(parts.values()) <= profile["step"] <= sum(slowest.values())
        # The measuring itself, between parts, is in the line's seconds alone.
        assert profile["step"] > line["seconds"] / 2


def test_speed_and_flops(run: Path, profiles: list[dict[str, Any]]) -> None:
    for line, profile in zip(runs.metrics(run), profiles, strict=True):
        assert profile["tokens_per_second"] == line["tokens"] / profile["step"]
        assert profile["mfu"] == pytest.approx(profile["tflops"] / 0.5)
        assert 0 < profile["mfu"] < 1


def test_communication_is_part_of_the_step(profiles: list[dict[str, Any]]) -> None:
    for profile in profiles:
        found = profile["communication"]
        assert 0 < found["exposed"] <= found["seconds"] <= found["slowest"] <= profile["step"]


@pytest.mark.floors
def test_memory(profiles: list[dict[str, Any]], task: Path) -> None:
    """All is fp32 here: beside a copy that the forward reads, A and B have a gradient, m and v."""
    first, *later = (profile["memory"] for profile in profiles)
    assert all(memory == first for memory in later)
    assert first["low_halves"] == first["carry"] == 0
    assert first["masters"] == first["gradients"] == first["moments"] // 2 > 0
    numel = _parameters(task)
    assert numel * 4 / 2 <= first["base"] <= 1.1 * numel * 4 / 2


def _parameters(task: Path) -> int:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(task).num_parameters()


def test_peaks_of_all_parts(profiles: list[dict[str, Any]]) -> None:
    import torch

    if restart_peak(torch.device("cpu")) is None:
        pytest.skip("this kernel keeps no peak that can begin anew")
    for profile in profiles:
        assert list(profile["peak"]) and set(profile["peak"]) == set(PARTS)
        assert all(peak > 2**20 for peak in profile["peak"].values())


@pytest.mark.floors
def test_traces_show_the_windows_steps_and_their_parts(run: Path) -> None:
    found = {path.name for path in (run / "profile").glob("trace-*")}
    steps = range(WINDOW[0], WINDOW[1] + 1)
    assert found == {f"trace-step{s}-rank{r}.json.gz" for s in steps for r in range(2)}
    for path in (run / "profile").glob("trace-*"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        marks = {e["name"]: e for e in events if e.get("cat") == "user_annotation"}
        (step,) = (s for s in steps if f"step {s}" in marks)
        assert f"step{step}-" in path.name
        whole = marks[f"step {step}"]
        for part in PARTS:
            assert whole["ts"] <= marks[part]["ts"]
            assert marks[part]["ts"] + marks[part]["dur"] <= whole["ts"] + whole["dur"]
        assert any(name.startswith("gloo:") for name in marks)


@pytest.mark.floors
def test_tensorboard_has_every_number(run: Path, profiles: list[dict[str, Any]]) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for tag in ("parts/forward", "slowest/merge", "communication/exposed", "mfu", "memory/base"):
        assert len(board.Scalars(f"train/profile/{tag}")) == STEPS
    last = board.Scalars("train/profile/parts/forward")[-1]
    assert last.value == pytest.approx(profiles[-1]["parts"]["forward"])


def test_the_report_holds_medians(run: Path, profiles: list[dict[str, Any]]) -> None:
    report = json.loads((run / "profile" / "profile.json").read_text())
    merges = sorted(profile["parts"]["merge"] for profile in profiles[1:])
    assert report["median"]["parts"]["merge"] == pytest.approx((merges[1] + merges[2]) / 2)
    assert (report["steps"], report["ranks"], len(report["traces"])) == (STEPS - 1, 2, 4)
    assert sum(report["share"].values()) == pytest.approx(1)
    table = render_profile(report)
    for name in (*PARTS, "communication", "base weights", "MFU", *report["traces"]):
        assert name in table
    # Parts of nothing are left out.
    assert "carry" not in table


def test_training_is_as_without(run: Path, task: Path, ranks: Any, tmp_path: Path) -> None:
    """To the last digit; and without the option nothing of it is left."""
    ranks(2).run(runs.run, options(task, tmp_path / "plain"))
    plain = runs.metrics(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()
    assert all("profile" not in line for line in plain)

    def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return tiny_runs.timeless([{k: v for k, v in x.items() if k != "profile"} for x in lines])

    assert timeless(runs.metrics(run)) == timeless(plain)


@pytest.mark.heavy
def test_a_run_goes_on_with_its_profile(run: Path, task: Path, ranks: Any, tmp_path: Path) -> None:
    """From step 2: the window is counted from there unless it is given; older lines stay."""
    output = tmp_path / "more"
    ranks(2).run(
        runs.run,
        options(task, output, profile=True, resume_from_checkpoint=run / "checkpoint-2"),
    )
    lines = runs.metrics(output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(list(line["profile"]["parts"]) == PARTS for line in lines)
    assert [line["loss"] for line in lines] == runs.losses(run)
    found = {path.name for path in (output / "profile").glob("trace-*")}
    assert found == {f"trace-step5-rank{r}.json.gz" for r in range(2)}
    report = json.loads((output / "profile" / "profile.json").read_text())
    assert report["steps"] == 2  # of the three that this run took


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero2", marks=pytest.mark.heavy)])
def test_a_late_rank_shows_in_the_others_communication(
    task: Path, ranks: Any, tmp_path: Path, engine: str
) -> None:
    output = tmp_path / "late"
    case = options(task, output, engine, profile=True, profile_window="1 1", max_steps=3)
    ranks(2).run(profile_work.late_backward, case, 2)
    profile = runs.metrics(output)[1]["profile"]
    assert profile["communication"]["slowest"] > 0.9 * profile_work.LATE
    assert profile["slowest"]["backward"] > profile_work.LATE
    assert profile["communication"]["slowest"] <= profile["step"]


def test_a_window_beyond_the_run_is_refused(task: Path, ranks: Any, tmp_path: Path) -> None:
    case = options(task, tmp_path / "none", profile=True, profile_window=f"4 {STEPS + 1}")
    for sentence, status, _ in ranks(2).run(tiny_runs.refusal, case):
        assert f"--profile_window 4 {STEPS + 1}: the run ends after step {STEPS};" in sentence
        assert status == 2
    assert not (tmp_path / "none").exists()
