"""Records requests to stop: SIGTERM and SIGUSR1, which Slurm sends before it preempts a job."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from scalora_dist.distributed.worker_signals import SIGNALS
from scalora_dist.errors import Preempted, is_rank_0

if TYPE_CHECKING:
    from scalora_dist.distributed.stop_together import OtherRanks
    from scalora_dist.distributed.world import World

# Name of the file in output_dir that marks a run stopped by a signal. torchrun does not pass on
# the exit status of its ranks.
PREEMPTED = "preempted"


class StopSignals:
    """Inside ``with``, a signal ends the process with status 75, now or when nothing is lost.

    Between ``hold`` and ``release`` a signal is only recorded, and the run asks ``received``
    between two steps. Everywhere else (loading, the last evaluation, the exports) all that was
    trained is saved, so the process ends at once, even if its main thread waits for other ranks.
    After ``share`` the other ranks end with it.

    ``with`` may be nested; the inner ones do nothing.

    Attributes:
        received: name of the first signal, or None.
        output_dir: folder in which a signal leaves the file ``preempted``, or None: not yet known.
        step: number of steps that are trained and saved.
        advice: half a sentence that says what is saved and how to go on.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.output_dir: Path | None = None
        self.step = 0
        self.advice = "nothing was trained yet: start it again"
        self._depth = 0
        self._held = False
        self._deciding = threading.Lock()
        self._others: OtherRanks | None = None
        self._others_left = False

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth == 1:
            # The C-level handler writes the signal's number at once. Python's runs in the main
            # thread, which may wait for other ranks for minutes.
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            # Ends the thread. A mere close would not where a forked process has a copy.
            self._writer.shutdown(socket.SHUT_RDWR)
            self._writer.close()
            self._thread.join()
            self._reader.close()
            if self._others:
                self._others.close()

    def share(self, world: World) -> None:
        """From now on, a signal to one rank counts on all. Called on every rank."""
        # Not before: signals count from the start, and torch takes seconds to import.
        from scalora_dist.distributed.stop_together import OtherRanks

        if world.size > 1:
            self._others = OtherRanks(world.store, world.size, self._hear_of_others)
            self._others.listen()

    def hold(self) -> None:
        """From now on a signal is only recorded. An earlier one ends the process."""
        self._hold(True)

    def release(self) -> None:
        """From now on a signal ends the process at once. So does a recorded one."""
        self._hold(False)

    def finish(self) -> None:
        """The run is finished: signals no longer count. Ranks then end one by one."""
        with self._deciding:
            self._held = True

    def outlast(self) -> None:
        """The process is about to end by itself: after ``with`` no signal changes its status."""
        self._before = dict.fromkeys(SIGNALS, signal.SIG_IGN)

    def ignore(self) -> None:
        """The run has failed: the signal that launchers then send to all ranks kills this one.

        Called in the main thread.
        """
        self.finish()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def end_with_others(self) -> None:
        """After a failed collective: end the process if others have ended on a signal."""
        if self._others_left:
            self._leave()

    def _hold(self, held: bool) -> None:
        with self._deciding:
            if self.received:
                self._leave()
            self._held = held

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        while numbers := self._reader.recv(16):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number).name)

    def _hear(self, name: str) -> None:
        self.received = self.received or name
        with self._deciding:
            if not self._held:
                self._leave()

    def _hear_of_others(self, name: str) -> None:
        """Another rank leaves. Where this one is held already, its next collective will fail."""
        self._others_left = True
        self._hear(name)
        assert self._others
        self._others.acknowledge()

    def _leave(self) -> NoReturn:
        """Exit without any clean-up, which could wait for other ranks."""
        assert self.received
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        all_end = self._others.tell(self.received) if self._others else alone
        if all_end and self.output_dir:
            mark_preempted(self.output_dir, self.step)
        if is_rank_0():
            # Not by sys.stderr: the main thread may hold its lock.
            os.write(2, f"\nstopped by {self.received}: {self.advice}\n".encode())
        os._exit(Preempted.status)


def mark_preempted(output_dir: Path, step: int) -> None:
    """Write the file ``preempted``, which says after how many steps a signal stopped the run."""
    with suppress(OSError):  # a checkpoint may have filled the disk
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / PREEMPTED).write_text(f"{step}\n")
