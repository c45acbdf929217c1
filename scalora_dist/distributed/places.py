"""Where a thread is: its line of code, and whether it waits for other ranks there."""

from __future__ import annotations

import faulthandler
import os
import re
import sysconfig
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

LONGEST = 200  # bytes of a place or a phase
PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("<frozen", sysconfig.get_paths()["stdlib"])
# Paths of code that waits for other ranks: in any frame of a stack (COLLECTIVES), or only in the
# innermost one (WAITS).
COLLECTIVES = (
    "-packages/deepspeed/comm/",
    "-packages/torch/distributed/distributed_c10d.py",
    "-packages/torch/distributed/_functional_collectives.py",
)
WAITS = (
    "-packages/deepspeed/",
    "-packages/torch/cuda/",  # for a GPU that waits
    "-packages/torch/distributed/",
    str(PACKAGE / "distributed" / "world.py"),
)


def place_of(thread: int) -> tuple[str, bool]:
    """A thread's innermost line outside the libraries, and whether it waits for other ranks.

    Args:
        thread: its ``threading.get_ident()``.
    """
    threads = _stacks()
    stack = threads.get(thread)
    if not stack:
        return "an unknown place", False
    stacks = [stack]
    if stack[0].function == "_engine_run_backward":  # on a GPU, hooks run in other threads
        stacks = list(threads.values())
    here = next((call for call in stack if not _in_library(call)), stack[0])
    name = f"{Path(here.file).name}:{here.line} in {here.function}"
    return short(name), any(map(_waits, stacks))


def short(text: str) -> str:
    """A text without control characters, of at most ``LONGEST`` bytes."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:LONGEST])
    return printable.encode()[:LONGEST].decode(errors="ignore")


class _Call(NamedTuple):
    file: str
    line: str  # "??" where the interpreter does not know it
    function: str


def _stacks() -> dict[int, list[_Call]]:
    """{thread: its calls, innermost first}.

    Uses faulthandler, which makes no frame objects. Walking the frames of another, running thread
    (``sys._current_frames``) has crashed CPython 3.11.
    """
    try:
        memory = os.memfd_create("stacks")
    except (AttributeError, OSError):  # not Linux, or refused: a file, maybe on a full disk
        memory = None
    with TemporaryFile() if memory is None else open(memory, "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode(errors="replace")
    stacks: dict[int, list[_Call]] = {}
    calls: list[_Call] = []
    for line in text.splitlines():
        if head := re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)", line):
            calls = stacks[int(head[1], 16)] = []
        elif call := re.match(r'  File "(.*)", line (\S+) in (.*)', line):
            calls.append(_Call(*call.groups()))
    return {thread: calls for thread, calls in stacks.items() if calls}


def _in_library(call: _Call) -> bool:
    library = "-packages/" in call.file or call.file.startswith(LIBRARIES)
    return library and not call.file.startswith(str(PACKAGE))


def _waits(stack: list[_Call]) -> bool:
    files = [call.file for call in stack]
    return any(part in files[0] for part in WAITS) or any(
        part in file for part in COLLECTIVES for file in files
    )
