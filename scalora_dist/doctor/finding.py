"""One line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: name of the check.
        found: what was found, one line.
        advice: one sentence that says what to do; None: all is well.
        fatal: whether a run would fail or train wrongly. Otherwise the advice is a warning.
    """

    check: str
    found: str
    advice: str | None = None
    fatal: bool = True

    @property
    def failed(self) -> bool:
        return self.advice is not None and self.fatal


def table(findings: list[Finding]) -> str:
    """The findings as lines, and below them what to do about those that are not well."""
    width = max(len(each.check) for each in findings)
    lines = []
    for each in findings:
        mark = "ok" if each.advice is None else "FAIL" if each.fatal else "warn"
        lines.append(f"  {mark:<5} {each.check:<{width}}  {each.found}")
    advised = [each for each in findings if each.advice]
    failed = sum(each.failed for each in findings)
    lines += ["", f"{failed} of {len(findings)} checks failed" if failed else "ready to train"]
    lines += [f"  {each.check}: {each.advice}" for each in advised]
    return "\n".join(lines)
