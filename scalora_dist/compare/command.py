"""``scalora compare``: runs a study, and writes its report while it runs."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

import torch
from tqdm import tqdm

from scalora_dist.compare.data import cut_data, data_options
from scalora_dist.compare.plots import Plots
from scalora_dist.compare.record import (
    LOG,
    OUTPUT,
    Records,
    ends_finite,
    gave_up,
    make_record,
    prepare,
    read_metrics,
    run_of,
    tidy,
)
from scalora_dist.compare.report import write_report
from scalora_dist.compare.results import compute
from scalora_dist.compare.runs import Cell, Run
from scalora_dist.compare.schedule import CellPlan, plan
from scalora_dist.compare.study import Study, method_options, parse_folderless, read_study, words_of
from scalora_dist.compare.workers import Workers
from scalora_dist.config.option import Group, tool_option
from scalora_dist.config.training import TrainArguments
from scalora_dist.config.words import Parser
from scalora_dist.distributed.cores import cores
from scalora_dist.distributed.stop_signals import StopSignals
from scalora_dist.errors import Preempted, UserError
from scalora_dist.training.resolve import resolve_batch

DESCRIPTION = """Compare methods: tune the learning rate of each, then train with fresh seeds.
docs/compare.md explains study.yaml and the report."""
POLL_SECONDS = 0.5  # how long a signal may wait


@dataclass(frozen=True)
class CompareArguments(Group):
    _argument_group_name = "compare"

    output_dir: Optional[str] = tool_option(
        None, "Folder of the study; started again with the same one, the study goes on."
    )
    workers: Optional[int] = tool_option(
        None,
        "Runs at a time; by default the GPUs (or cores) divided by gpus_per_run.",
        at_least=1,
    )
    report_only: bool = tool_option(
        False, "Only write the report of the runs that are finished; trains nothing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir:
            raise UserError("--output_dir is missing: say where the study's results go")


def compare_command(
    words: Sequence[str], signals: StopSignals, context: ForkServerContext | None = None
) -> None:
    """Run a study, or go on with it.

    Args:
        words: study.yaml and the options.
        signals: what handles requests to stop; already entered.
        context: what starts the runs; by default a fork server of the study's own.

    Raises:
        UserError: a mistake in the study or the data, or a run failed.
        Preempted: the study was asked to stop, and its runs have stopped.
    """
    parser = Parser(
        [CompareArguments], allow_abbrev=False, prog="scalora compare", description=DESCRIPTION
    )
    parser.add_argument("study", help="A YAML file: the study.")
    args, named = parser.parse_args_into_dataclasses(list(words))
    study = read_study(named.study)
    _check_first_runs(study)
    folder = Path(args.output_dir)
    if args.report_only:
        records = Records(folder / "runs.jsonl")
        if not records.lines:
            raise UserError(f"--report_only: {folder} has no finished runs: leave it out")
        _check_same_options(study, folder, records)
        _Reporter(study, folder, records).write(study.setups)
        return
    workers = _workers(study, args.workers, context)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}: name another") from error
    with Records(folder / "runs.jsonl") as records:
        _check_same_options(study, folder, records)
        for setup in study.setups.values():
            cut_data(study, setup, folder / "data" / setup.name)
        _Studying(study, folder, records, workers, signals).run()


class _Studying:
    """Starts the runs that a study needs, and records those that have ended."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        records: Records,
        workers: Workers,
        signals: StopSignals,
    ) -> None:
        self.study = study
        self.folder = folder
        self.records = records
        self.workers = workers
        self.signals = signals
        self.device = _device_name()
        self.reporter = _Reporter(study, folder, records)

    def run(self) -> None:
        """Run until nothing is needed."""
        for run in self.records.finished():
            tidy(self._folder(run))
        self.signals.hold()  # from now on a signal is only noted
        tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a stop would leak
        before: list[CellPlan] = []
        with tqdm(unit="run", initial=len(self.records.lines)) as bar:
            try:
                while True:
                    plans = plan(self.study, self.records.finished())
                    running = self._start(plans)
                    self._tell(before, plans, bar)
                    before = plans
                    if not running:
                        break
                    self._take_ended(bar)
            except KeyboardInterrupt:
                self.signals.received = self.signals.received or "SIGINT"
                self._stop()
            except UserError:
                self.workers.stop()
                raise

    def _start(self, plans: list[CellPlan]) -> bool:
        """Start needed runs in all free places. Returns whether any run is in progress."""
        busy = {each.run for each in self.workers.running}
        queue = [run for each in plans for run in each.needed if run not in busy]
        while queue and self.workers.free:
            run = queue.pop(0)
            folder, options = self._folder(run), self.study.options(run)
            prepare(folder, options)
            options |= data_options(run, self.folder / "data")
            options |= {"output_dir": str(folder / OUTPUT), "resume_from_checkpoint": "latest"}
            self.workers.start(run, words_of(options), folder / LOG)
        return bool(self.workers.running)

    def _take_ended(self, bar: tqdm[Any]) -> None:
        """Wait until a run has ended, and record it.

        Raises:
            Preempted: a signal has come.
        """
        ended: list[tuple[Run, int, float]] = []
        while not ended and self.signals.received is None:
            ended = self.workers.ended(POLL_SECONDS)
        if self.signals.received:
            self._stop()
        for run, status, seconds in ended:
            self._record(run, status, seconds)
            bar.update()

    def _record(self, run: Run, status: int, seconds: float) -> None:
        folder, options = self._folder(run), self.study.options(run)
        metrics = read_metrics(folder / OUTPUT)
        most = int(options.get("max_skipped_steps", TrainArguments.max_skipped_steps))
        stopped_early = gave_up(metrics, most)
        if status and not stopped_early:
            raise UserError(f"{run}: failed with status {status}; see {folder / LOG}")
        record = make_record(
            run,
            options,
            folder / OUTPUT,
            has_diverged=stopped_early or not ends_finite(metrics),
            seconds=seconds,
            device=self.device,
        )
        self.records.add(record)
        tidy(folder)

    def _stop(self) -> None:
        """Stop all runs.

        Raises:
            Preempted: always.
        """
        self.workers.stop()
        raise Preempted(
            f"stopped by {self.signals.received}: {len(self.records.lines)} runs are finished; "
            "the same command goes on"
        )

    def _tell(self, before: list[CellPlan], plans: list[CellPlan], bar: tqdm[Any]) -> None:
        """Print the cells that are decided now, write the report, and say how long it takes."""
        decided = {each.cell for each in before if each.decided}
        complete = {each.cell for each in before if each.complete}
        changed = set()
        for each in plans:
            if each.decided and each.cell not in decided:
                rate = "all diverged" if each.best_rate is None else f"{each.best_rate:g}"
                bar.write(f"{each.cell}: best rate {rate}")
                changed.add(each.cell.setup)
            if each.complete and each.cell not in complete:
                changed.add(each.cell.setup)
        if changed:
            self.reporter.write(changed)
        finals = len(self.study.final_seeds)
        needed = sum(len(each.needed) + (not each.decided) * finals for each in plans)
        bar.total = bar.n + needed
        if seconds := [record["seconds"] for record in self.records.lines]:
            left = needed * fmean(seconds) / self.workers.count
            bar.set_postfix_str(f"at least {tqdm.format_interval(left)} left", refresh=False)
        bar.refresh()

    def _folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.folder


class _Reporter:
    """Writes the report and the pictures of the runs that are finished."""

    def __init__(self, study: Study, folder: Path, records: Records) -> None:
        self.study = study
        self.folder = folder
        self.records = records
        self.plots = Plots(list(study.methods), folder)

    def write(self, setups: Container[str]) -> None:
        """Write the report, and the pictures of some set-ups."""
        finished = self.records.finished()
        results = compute(self.study, plan(self.study, finished), finished)
        write_report(self.study, results, self.records.lines, self.folder)
        for setup in results:
            if setup.name in setups:
                self.plots.draw(setup)


def _check_first_runs(study: Study) -> None:
    """
    Raises:
        UserError: options of a run contradict each other, or its ranks.
    """
    for cell in study.cells:
        first = Run(cell, study.methods[cell.label].grid.rate(0), study.tuning_seeds[0], "tune")
        try:
            options = parse_folderless(study.options(first))
            resolve_batch(options.train, study.gpus_per_run)
        except UserError as error:
            raise UserError(f"{first}: {error}") from error


def _check_same_options(study: Study, folder: Path, records: Records) -> None:
    """
    Raises:
        UserError: a finished run had other options, or ranks, than the study now gives it.
    """
    cells = set(study.cells)
    read: dict[Cell, dict[str, Any]] = {}  # no option of a method depends on rate or seed
    for record in records.lines:
        run = run_of(record)
        if run.cell not in cells:
            continue
        options = study.options(run)
        if run.cell not in read:
            read[run.cell] = method_options(options)
        other = _differing(record["options"], options)
        # Another version may have had other defaults, or not all of today's options.
        then, now = record.get("method_options", {}), read[run.cell]
        other |= _differing(then, now) & then.keys() & now.keys()
        # A run that diverged has no summary, so its ranks are not known.
        if record.get("world_size") not in (None, study.gpus_per_run):
            other.add("gpus_per_run")
        if other:
            raise UserError(
                f"{folder} holds runs with other options ({run}: {', '.join(sorted(other))}): name "
                "another --output_dir"
            )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """The options that differ, however their values are written."""
    return {name for name in {*one, *other} if str(one.get(name)) != str(other.get(name))}


def _workers(study: Study, wanted: int | None, context: ForkServerContext | None) -> Workers:
    """The workers: as many as there are GPUs for, or cores.

    Raises:
        UserError: there are too few GPUs.
    """
    ranks = study.gpus_per_run
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        most = len(gpus) // ranks
        if (wanted or 1) > most:
            raise UserError(
                f"{wanted or 1} run(s) at a time of {ranks} GPU(s) each need more than the "
                f"{len(gpus)} GPU(s) here: lower --workers or gpus_per_run"
            )
    else:
        gpus, most = [], max(1, cores() // ranks)
    return Workers(
        wanted or most, ranks=ranks, gpus=gpus, quantized=study.quantized, context=context
    )


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
