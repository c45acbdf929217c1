"""Writes a study's results for readers: report.md and results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalora_dist.compare.results import (
    CellResult,
    Comparison,
    SetupResult,
    Table,
    picture,
)
from scalora_dist.compare.runs import Cell
from scalora_dist.compare.schedule import MOST_WIDENINGS
from scalora_dist.compare.statistics import LEVEL, TOLERANCE, WINDOW, Difference
from scalora_dist.compare.study import Setup, Study
from scalora_dist.config.data import DataArguments
from scalora_dist.training.run_log import write_json

SMOKE = "**A smoke run is no study: too few seeds, or too short.**"
HEADER = (
    *("method", "best rate", "train loss", "held-out loss ± sd", "exact match"),
    *("difference of held-out loss [interval]", "verdict"),
    *("difference of exact match [interval]", "steps to baseline's loss", "seconds to it"),
    *("trained parameters", "mean rank of ΔW", "rules", "ms a step", "peak MiB"),
)
AGAINST_HEADER = (
    *("method", "against", "difference of held-out loss [interval]", "verdict"),
    *("difference of exact match [interval]", "steps to its loss", "seconds to it"),
)


def write_report(
    study: Study, results: Sequence[SetupResult], records: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write report.md and results.json, each whole or not at all."""
    aside = folder / "report.md.partial"
    aside.write_text(render(study, results, records))
    aside.replace(folder / "report.md")
    value = {
        "study": asdict(study),
        "setups": {each.name: asdict(each) for each in results},
        "runs": list(records),
    }
    write_json(folder / "results.json", value)


def render(
    study: Study, results: Sequence[SetupResult], records: Iterable[Mapping[str, Any]]
) -> str:
    """The contents of report.md."""
    lines = [SMOKE, ""] if study.smoke else []
    lines += ["# Comparison of methods", "", *_how(study)]
    for setup in results:
        lines += ["", f"## {setup.name}", ""]
        lines += _setup_lines(setup)
    lines += ["", "## What was run", ""]
    rows = [(name, _options(_data(setup) | setup.options)) for name, setup in study.setups.items()]
    rows += [(label, _options(method.options)) for label, method in study.methods.items()]
    lines += _markdown(("set-up or method", "options"), rows)
    lines += ["", f"On {', '.join(sorted({_machine(record) for record in records}))}."]
    return "\n".join(lines) + "\n"


def _data(setup: Setup) -> dict[str, Any]:
    """The options that say what data a set-up has; of generated tasks ``dataset_options`` too."""
    source = setup.source
    said = {"dataset": source.dataset, "dataset_split": source.dataset_split}
    if source.dataset_config_name is not None:
        said["dataset_config_name"] = source.dataset_config_name
    if source.dataset_options != DataArguments.dataset_options:
        said["dataset_options"] = source.dataset_options
    if setup.test_dataset:
        said |= {"test_dataset": setup.test_dataset, "test_dataset_split": setup.test_dataset_split}
    return said


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _machine(record: Mapping[str, Any]) -> str:
    """For example "NVIDIA H200 (torch 2.13.0, transformers 5.23.0)"."""
    names = ("scalora_dist", "torch", "transformers")
    versions = ", ".join(f"{name} {record['versions'].get(name)}" for name in names)
    return f"{record['device']} ({versions})"


def _how(study: Study) -> list[str]:
    tuning, finals = len(study.tuning_seeds), len(study.final_seeds)
    return [
        f"Learning rates are chosen by {study.choose_by} on {study.validation_size} validation "
        f"examples, with up to {tuning} tuning seeds. Final runs have {finals} other seeds, and "
        f"are evaluated on {study.test_size} test examples.",
        f"Differences are to {study.baseline} at the same rank, paired by seed. Their intervals "
        f"are by Student's t. Those of the loss in a set-up hold together with {LEVEL:.0%} "
        "(Bonferroni), and so do those of the exact match.",
        f"Train loss is the mean of the last {WINDOW:.0%} of the steps. Times are those of the "
        "device that the runs had, with other runs beside them.",
    ]


def _setup_lines(setup: SetupResult) -> list[str]:
    lines = []
    by_pair = {(each.ours, each.theirs): each for each in setup.comparisons}
    for table in setup.tables:
        if table.rank is not None:
            lines += [f"### Rank {table.rank}", ""]
        lines += _markdown(HEADER, [_row(table, row, by_pair) for row in table.rows])
        # Names may have blanks and brackets, so links are in < >.
        lines += ["", f"![loss by rate](<{picture('rate', setup.name, table.rank)}>)"]
        lines += [f"![loss by step](<{picture('step', setup.name, table.rank)}>)", ""]
    if setup.against:
        rows = [_against_row(pair, by_pair.get(pair)) for pair in setup.against]
        lines += ["### At other ranks", "", *_markdown(AGAINST_HEADER, rows), ""]
    if len(setup.tables) > 1:
        lines += [f"![loss by rank](<{picture('rank', setup.name)}>)", ""]
    rows_of = {row.cell: row for table in setup.tables for row in table.rows}
    lines += ["### Learning rates", ""]
    lines += _markdown(
        ("method", "rank", "rates tried", "best", "good rates", "highest/lowest good rate"),
        [_rates_row(row) for row in rows_of.values()],
    )
    lines += [
        "",
        f"Good rates have a loss at most {TOLERANCE:.0%} above that of the best, with the first "
        "tuning seed. "
        f"{setup.planned} comparisons share the level of this set-up's intervals.",
    ]
    for row in rows_of.values():
        if row.limited and row.best_rate is not None:
            lines += [
                "",
                f"**{row.cell}: the best rate is at the edge of the grid, which was widened "
                f"{MOST_WIDENINGS} times.** A better rate may lie outside.",
            ]
    return lines


def _row(
    table: Table, row: CellResult, by_pair: Mapping[tuple[Cell, Cell], Comparison]
) -> list[str]:
    rate = f"{row.best_rate:g}" if row.best_rate else ""
    if not row.decided:
        return [row.cell.label, "tuning"]
    if row.best_rate is None:
        return [row.cell.label, "diverged at all rates"]
    if not row.complete:
        return [row.cell.label, rate, "final runs"]
    found = by_pair.get((row.cell, table.baseline)) if table.baseline else None
    cells = [row.cell.label, rate, _mean(row.train_loss)]
    cells += [_spread(row.loss, ".4f"), _spread(row.exact_match, ".1%")]
    if row.cell == table.baseline:
        verdict = f"diverged with {row.diverged} seeds" if row.diverged else "baseline"
        cells += ["", verdict, "", "", ""]
    else:
        cells += _comparison(found)
    rules = ", ".join(f"{rule} {share:.0%}" for rule, share in (row.rules or {}).items())
    return [
        *cells,
        f"{row.trained_parameters:,}" if row.trained_parameters else "",
        f"{row.update_rank:.1f}" if row.update_rank is not None else "",
        rules,
        f"{1000 * row.seconds_per_step:.1f}" if row.seconds_per_step else "",
        f"{row.peak_memory_bytes / 2**20:,.0f}" if row.peak_memory_bytes else "",
    ]


def _comparison(found: Comparison | None) -> list[str]:
    """Difference, verdict, difference of exact match, steps, seconds."""
    if found is None:
        return ["", "not compared", "", "", ""]
    reached = ("not reached", "not reached")
    if found.steps is not None and found.seconds is not None:
        reached = (str(found.steps), f"{found.seconds:.1f}")
    loss, match = _difference(found.loss, ".4f"), _difference(found.exact_match, ".1%")
    return [loss, found.loss.verdict, match, *reached]


def _against_row(pair: tuple[Cell, Cell], found: Comparison | None) -> list[str]:
    ours, theirs = (f"{cell.label}, rank {cell.rank}" for cell in pair)
    return [ours, theirs, *(_comparison(found) if found else ["", "not finished"])]


def _rates_row(row: CellResult) -> list[str]:
    tried = sorted({each["learning_rate"] for each in row.tuning})
    lost = sorted({each["learning_rate"] for each in row.tuning if each["loss"] is None})
    text = f"{tried[0]:g} to {tried[-1]:g} ({len(tried)})" if tried else ""
    if lost:
        text += f"; diverged at {', '.join(f'{rate:g}' for rate in lost)}"
    good = row.good_rates
    return [
        row.cell.label,
        "" if row.cell.rank is None else str(row.cell.rank),
        text,
        f"{row.best_rate:g}" if row.best_rate else "",
        f"{good[0]:g} to {good[1]:g}" if good else "",
        f"{good[1] / good[0]:.3g}" if good else "",
    ]


def _mean(values: Mapping[str, Any] | None) -> str:
    return f"{values['mean']:.4f}" if values else ""


def _spread(values: Mapping[str, Any] | None, form: str) -> str:
    return f"{values['mean']:{form}} ± {values['sd']:{form}}" if values else ""


def _difference(found: Difference, form: str) -> str:
    if found.mean is None:
        return "infinite"
    signed = f"+{form}"
    return f"{found.mean:{signed}} [{found.low:{signed}}, {found.high:{signed}}]"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table. Short rows are filled up with empty cells."""
    filled = [
        [*(cell.replace("|", "\\|") for cell in row), *[""] * (len(header) - len(row))]
        for row in rows
    ]
    lines = [header, ["---"] * len(header), *filled]
    return [f"| {' | '.join(line)} |" for line in lines]
