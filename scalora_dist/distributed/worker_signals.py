"""Signals in the processes that a rank starts: they end with the rank, and only with it."""

from __future__ import annotations

import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # requests to stop
ENDINGS = {*SIGNALS, signal.SIGINT}  # signals that would end a worker
LOOK = 1.0  # seconds between two looks whether the rank is still there


def outlive_signals(run: int) -> None:
    """Let no stop signal end this worker, unless it comes from the rank. Called in the worker.

    A batch system signals all processes of a job, and the rank goes on until its state is saved.
    When the rank is gone, its workers end by themselves within ``LOOK``.

    Args:
        run: process id of the rank.
    """
    if os.getppid() != run:  # it is gone already
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # threads started after this inherit it
    threading.Thread(target=_end_with, args=(run,), daemon=True).start()


def _end_with(run: int) -> None:
    while os.getppid() == run:
        received = signal.sigtimedwait(ENDINGS, LOOK)
        if received and received.si_pid == run:
            break
    os._exit(0)
