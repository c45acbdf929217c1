"""Runs the doctor's checks one by one on all ranks, and prints the table."""

from __future__ import annotations

import itertools
import json
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World
from scalora_dist.doctor.finding import Finding, line
from scalora_dist.errors import Preempted, RunExit

GRACE = 10.0  # seconds that a rank whose check failed waits for the others to end the check


class Checkup:
    """Each check is a call on all ranks. Rank 0 prints its line as soon as all have ended it.

    The ranks tell each other over the store how a check ended, because an error may have left a
    collective half done. A rank that dies or hangs in a check ends the job with one sentence.

    Attributes:
        world: the ranks.
        watchdog: names a rank that dies or hangs.
        failed: number of checks that failed; the same on all ranks.
        broken: whether some ranks left a check by an error and others did not. Then messages of
            that check may still be under way, and no later check is tried.
    """

    def __init__(self, world: World, hang_timeout: float) -> None:
        """
        Args:
            hang_timeout: seconds that a check may take.
        """
        self.world = world
        own = world.exchange(uuid.uuid4().hex)[0]  # the same on all ranks
        self._names = (f"{own}/{number}" for number in itertools.count())
        # With a prefix, because the watchdogs of the tiny runs use the same store.
        apart = replace(world, store=dist.PrefixStore(own, world.store))
        self.watchdog = Watchdog(apart, hang_timeout)
        self.failed = 0
        self.broken = False

    def run(self, name: str, check: Callable[[], Finding], *, unless: str = "") -> bool:
        """Run a check on all ranks. What rank 0 found counts.

        Args:
            name: the check's name in the table.
            check: its error on any rank is a failure of the check.
            unless: why the check cannot be tried; the same on all ranks. Empty: it can.

        Returns:
            whether it was tried and did not fail; the same on all ranks.
        """
        if self.broken:
            unless = "the failed check may have left messages behind"
        if unless:
            self._print(line("-", name, f"not tried: {unless}"))
            return False
        self.watchdog.at(f"the check of {name}")
        begun = time.monotonic()
        finding, error = Finding(""), ""
        try:
            finding = check()
        except Preempted:  # the user ended the doctor
            raise
        except Exception as problem:
            error = f"rank {self.world.rank} ({socket.gethostname()}): {_sentence(problem)}"
        answer = json.dumps([time.monotonic() - begun, error, finding.failed])
        try:
            patience = GRACE if error else None
            answers = self.world.exchange(answer, name=next(self._names), patience=patience)
        except TimeoutError:  # the others wait for this rank in a collective
            self.watchdog.end(f"the check of {name} failed: {error}")
        seconds, errors, failed = zip(*map(json.loads, answers), strict=True)
        if any(errors):
            raised = sorted((s, e) for s, e in zip(seconds, errors, strict=True) if e)
            # Errors that come much later are of ranks that waited for the first one.
            self.broken = not all(errors) or raised[-1][0] - raised[0][0] > GRACE / 2
            finding = Finding(raised[0][1], "mend that, and start the doctor again")
        ok = not any(errors) and not failed[0]
        self.failed += not ok
        self._print(finding.line(name))
        return ok

    def close(self) -> None:
        """Stop watching. All ranks call it."""
        self.watchdog.close()

    def _print(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def _sentence(problem: Exception) -> str:
    """The first line of an error that has text."""
    text = next((x.strip() for x in str(problem).splitlines() if x.strip()), "")
    if isinstance(problem, RunExit):
        return text
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
