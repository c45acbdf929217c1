"""Figure 2(c) and 2(d) of the paper on any model: the runs' options, and the table of them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options
from scalora_dist.errors import UserError

MICRO_BATCH = 32  # examples of one forward, at most


def options_of(words: Sequence[str], folder: Path, rank: int, batch: int) -> Options:
    """The options of one run: the user's, with this rank and global batch, and nothing exported.

    Raises:
        UserError: a mistake in the user's options, or one of those that are set here.
    """
    ours = {
        "rank": rank,
        "train_batch_size": batch,
        "per_device_train_batch_size": math.gcd(batch, MICRO_BATCH),
        "output_dir": folder / f"r{rank}-b{batch}",
        "save_steps": 0,
        "save_model": False,
        "update_rank_layers": 0,
    }
    for word in words:
        if (name := word.partition("=")[0].removeprefix("--")) in ours:
            raise UserError(f"{word}: scalora reproduce sets --{name}: give --ranks, --batch_sizes")
    return parse_options([*words, *(f"--{name}={value}" for name, value in ours.items())])


def table(data: dict[str, Any]) -> str:
    """Markdown: the assumptions of the theorems beside what was measured."""
    lines = [
        "The paper says: the assumption rank(∇ℓ) ≥ 2r “can be readily satisfied in practice” "
        "(figure 2(c)); the column solution is positive for a share of the layers (figure 2(d); "
        "the extracted text used here lacks the number).",
        "",
        f"{data['model']}, ranks of ∇ℓ over layers and measured steps:",
        "",
        "| r | batch | rank ≥ 2r | least rank | median rank | median stable rank | "
        "median min(m, n) |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in data["runs"]:
        ranks = [one["rank"] for one in run["gradients"]]
        enough = mean(rank >= 2 * run["rank"] for rank in ranks)
        stable = median(one["stable_rank"] for one in run["gradients"])
        size = median(one["size"] for one in run["gradients"])
        lines.append(
            f"| {run['rank']} | {run['batch']} | {enough:.1%} | {min(ranks)} | {median(ranks):g} | "
            f"{stable:.1f} | {size:g} |"
        )
    lines += [
        "",
        "Share of layers with a positive column solution, mean over steps; step 0, where A = 0, is "
        "apart:",
        "",
        "| r | batch | step 0 | steps 1 to 9 | all later steps | the same, within scale_bounds |",
        "|---|---|---|---|---|---|",
    ]
    for run in data["runs"]:
        shares = run["shares"]
        first = [one for one in shares if one["step"] == 0]
        early = [one for one in shares if 0 < one["step"] < 10]
        later = [one for one in shares if one["step"] >= 10]
        lines.append(
            f"| {run['rank']} | {run['batch']} | {_share(first, 'positive')} | "
            f"{_share(early, 'positive')} | {_share(later, 'positive')} | "
            f"{_share(later, 'bounded')} |"
        )
    return "\n".join(lines) + "\n"


def _share(steps: Sequence[dict[str, Any]], key: str) -> str:
    return f"{mean(step[key] for step in steps):.0%}" if steps else "—"
