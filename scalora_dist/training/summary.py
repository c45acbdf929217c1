"""Summarizes a run: the contents of summary.json, and the table shown at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scalora_dist.config.options import Options
from scalora_dist.training.evaluate import Evaluation

CHAT_TURNS = {
    "all": "every assistant turn",
    "last": "the last assistant turn",
    "each": "one assistant turn each",
}


@dataclass
class Tally:
    """Sums over the steps of a run, for its summary. A checkpoint holds them.

    Attributes:
        steps: number of steps, skipped ones included.
        skipped: number of skipped steps.
        loss_first: loss of the first step.
        loss_last: loss of the last step.
        layers_by_rule: {rule: number of layers' rescales that took it}.
        timed: number of steps that the sums below cover: all but the first, which also sets up
            kernels and buffers.
        tokens: number of tokens of the timed steps.
        seconds: seconds of the timed steps.
        own_seconds: seconds of them that the method took.
    """

    steps: int = 0
    skipped: int = 0
    loss_first: float = math.nan
    loss_last: float = math.nan
    layers_by_rule: dict[str, int] = field(default_factory=dict)
    timed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0

    def note(self, record: Mapping[str, Any]) -> None:
        """Add a step.

        Args:
            record: the step's line of metrics.jsonl.
        """
        self.steps += 1
        self.skipped += "skipped_step" in record
        self.loss_last = record["loss"]
        for rule, count in record.get("rescale", {}).items():
            if rule != "seconds":
                self.layers_by_rule[rule] = self.layers_by_rule.get(rule, 0) + count
        if self.steps == 1:
            self.loss_first = record["loss"]
        elif self.steps == 2:  # only now is there a step to time
            self.timed, self.tokens, self.seconds, self.own_seconds = 0, 0, 0.0, 0.0
        self.timed += 1
        self.tokens += record["tokens"]
        self.seconds += record["seconds"]
        # The metrics of transforms and restarts.
        own = [value for value in record.values() if isinstance(value, dict)]
        self.own_seconds += sum(said.get("seconds", 0.0) for said in own)


def summarize(
    options: Options,
    tally: Tally,
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    chat_turns: dict[str, int],
    world_size: int,
    rank: int | None,
    parameters: int,
    update_rank: list[int],
    carry: dict[str, Any],
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        options: all options of the run.
        tally: sums over all steps.
        before: the evaluation before the first step, or None.
        after: the evaluation after the last step, or None.
        chat_turns: {turns of a chat that an example trains on: number of such examples}.
        world_size: number of ranks.
        rank: r of the factors that the method adds, or None if it has no rank.
        parameters: number of trained parameters of the full model.
        update_rank: ranks of the accumulated updates of the measured layers.
        carry: number of columns (min, mean, max) and the largest lost share, or empty.
        peak_memory_bytes: peak memory in bytes of the rank that needed most.
    """
    return {
        "method": options.method.name,
        "scaling_rule": options.method.scaling_rule if tally.layers_by_rule else None,
        "rank": rank,
        "trained_parameters": parameters,
        "world_size": world_size,
        "chat_turns": chat_turns,
        "steps": tally.steps,
        "skipped_steps": tally.skipped,
        "loss_first": tally.loss_first,
        "loss_last": tally.loss_last,
        "eval_examples": after.examples if after else None,
        "eval_loss": [before.loss, after.loss] if before and after else None,
        "eval_exact_match": [before.exact_match, after.exact_match] if before and after else None,
        "layers_by_rule": tally.layers_by_rule,
        "update_rank": update_rank,
        "carry": carry,
        "seconds_per_step": tally.seconds / tally.timed,
        "torch_compile": options.train.torch_compile,
        "method_share": tally.own_seconds / tally.seconds,
        "tokens_per_second": tally.tokens / tally.seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "output_dir": options.train.output_dir,
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as an aligned table of two columns."""
    rows = []
    if summary["eval_loss"]:
        held_out = f"held-out {{}} ({summary['eval_examples']} examples)"
        loss, match = summary["eval_loss"], summary["eval_exact_match"]
        rows.append((held_out.format("loss"), f"{loss[0]:.3f} → {loss[1]:.3f}"))
        rows.append((held_out.format("exact match"), f"{match[0]:.1%} → {match[1]:.1%}"))
    rows.append(("training loss", f"{summary['loss_first']:.3f} → {summary['loss_last']:.3f}"))
    rules = dict(summary["layers_by_rule"])
    if kept := rules.pop("kept", 0):
        share = kept / (kept + sum(rules.values()))
        rows.append(("merges saved", f"{share:.0%} of all layers' rescales"))
    if total := sum(rules.values()):
        shares = ", ".join(f"{rule} {n / total:.0%}" for rule, n in rules.items() if n)
        rows.append(("rule taken, share of all layers' rescales", shares))
    if ranks := summary["update_rank"]:
        spread = f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.0f}"
        factors = f"factors: {summary['rank']}; " if summary["rank"] else ""
        of = f"({factors}{len(ranks)} layers measured)"
        rows.append(("rank of the accumulated update", f"{spread} {of}"))
    if carry := summary["carry"]:
        least, mean, most = carry["columns"]
        columns = f"{least} to {most}, mean {mean:.0f} columns"
        rows.append(("carry", f"{columns}; lost at most {carry['lost_max']:.1e} of an update"))
    if turns := summary["chat_turns"]:
        targets = ", ".join(f"{CHAT_TURNS[name]} ({n:,})" for name, n in turns.items())
        rows.append(("targets of chats (examples)", targets))
    rows.append(("trained parameters", f"{summary['trained_parameters']:,}"))
    own = summary["method_share"]
    share = f", {summary['method']}'s own work {own:.1%} of it" if own else ""
    compiled = ", compiling included" if summary["torch_compile"] else ""
    rows.append(("time per step", f"{summary['seconds_per_step']:.2f} s{share}{compiled}"))
    rows.append(("tokens per second", f"{summary['tokens_per_second']:.0f}"))
    if summary["skipped_steps"]:
        rows.append(("skipped steps", f"{summary['skipped_steps']} of {summary['steps']}"))
    rows.append(("peak memory of a rank", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    rows.append(("results", f"{summary['output_dir']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
