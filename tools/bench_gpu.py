"""Checks and measures this project on a GPU, in parts of at most ten minutes.

    python tools/bench_gpu.py [--parts first,merge,…] [--output_dir FOLDER]

| part    | what it does |
|---------|--------------|
| first   | what to look at first on a GPU: one line a check, pass or fail |
| tests   | the tests of the suite that can run on GPUs |
| merge   | merges at Gemma-3-12B's shapes, beside a copy on the device |
| loss    | the loss and its gradient at Gemma-3-12B's LM head: Liger, chunks, full logits |
| rescale | the whole rescale for five and seven projections, r = 8, 16 and 64 |
| step    | steps of a random Gemma-3-12B: LoRA, ScaLoRA, PEFT's LoRA, ScaLoRA on NF4 |
| ranks   | with several GPUs: ScaLoRA's step on 1, 2 and all, under ZeRO-3 and FSDP2 |

Each part is a process of its own. It writes FOLDER/PART.json while it runs and FOLDER/PART.log. A
part that fails or takes too long does not stop the next. At the end FOLDER/report.md holds the
device, the versions and a table of the goals. No network is used. `tools/gpu_wheels.txt` names the
wheels that a bare machine needs. Without a GPU everything runs on the CPU in a small form, which
tests the code and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.gpu.report import report  # noqa: E402 (this file needs no installed package)

PARTS = ("first", "tests", "merge", "loss", "rescale", "step", "ranks")
STATUS = {0: "done", None: "stopped: it took too long"}
PATIENCE = 20.0  # seconds that a stopped part may take to clean up


def command_of(part: str, file: Path, gpus: int, args: argparse.Namespace) -> list[str]:
    """The command line of a part, which writes ``file``."""
    smoke = [] if gpus else ["--smoke"]
    if part in ("first", "tests"):
        # `first` also runs its checks that are marked heavy.
        which = ["tests/gpu", "-m", "gpu"] if part == "first" else marked_tests()
        chosen = ["-k", args.only] if args.only else []
        command = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu.lines"]
        command += ["--gpus", str(gpus or 1), "--lines", str(file), *which, *chosen]
    elif part in ("step", "ranks"):
        ranks = ["--ranks", str(gpus or 2)] if part == "ranks" else []
        command = ["tools.gpu.steps", "--json", str(file), "--engine", args.engine, *ranks, *smoke]
        command += ["--ways", *args.ways] if args.ways else []
    else:
        command = [f"tools.gpu.{part}", "--json", str(file), *smoke]
    return [sys.executable, "-m", *command]


def marked_tests() -> list[str]:
    """The files of tests with the mark gpu, but for those of part first."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    own = ROOT / "tests" / "gpu"
    marked = [f for f in files if own not in f.parents and "mark.gpu" in f.read_text()]
    return [str(file.relative_to(ROOT)) for file in marked]


def run(command: list[str], log: Path, limit: float) -> str:
    """Run a command, show its output and keep it in ``log``. Returns how it ended."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        shown, deadline = 0, time.monotonic() + limit
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                shown = show(log, shown)
            status = process.poll()
        finally:
            end(process)
    show(log, shown)
    return STATUS.get(status, f"failed with status {status}: see {log}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part that still runs, with the processes that it started."""
    if process.poll() is not None:
        return
    # The first lets it remove its temporary files, among them 24 GB of weights.
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def show(log: Path, since: int) -> int:
    """Print what was added to ``log`` since byte ``since``. Returns its size."""
    with log.open("rb") as file:
        file.seek(since)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return since + len(text)


def read(file: Path) -> dict[str, Any]:
    """A part's figures; empty, where it wrote none."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def machine_of(folder: Path, limit: float) -> dict[str, Any]:
    """The devices and versions; empty, where torch or this package cannot be imported."""
    file = folder / "machine.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.gpu.machine", "--json", str(file)]
    run(command, folder / "machine.log", limit)
    return read(file)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="by comma, in any order")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--limit", type=float, default=600, help="seconds that a part may take")
    parser.add_argument("--engine", default="zero2", help="part step: ds_configs/'s, fsdp or local")
    parser.add_argument("--ways", nargs="+", help="part step: only these ways of training")
    parser.add_argument("--only", help="parts first and tests: pytest's -k")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: choose of {','.join(PARTS)}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = machine_of(folder, args.limit)
    if not machine:
        print("this machine cannot run it: install tools/gpu_wheels.txt first", file=sys.stderr)
        return 2
    found: dict[str, dict[str, Any]] = {}
    for part in args.parts:
        if part == "ranks" and machine["gpus"] == 1:
            print("== ranks: left out, there is one GPU", flush=True)
            continue
        print(f"== {part}", flush=True)
        file, begun = folder / f"{part}.json", time.monotonic()
        file.unlink(missing_ok=True)
        ended = run(
            command_of(part, file, machine["gpus"], args), folder / f"{part}.log", args.limit
        )
        seconds = round(time.monotonic() - begun, 1)
        found[part] = {**read(file), "ended": ended, "part_seconds": seconds}
        file.write_text(json.dumps({**found[part], "machine": machine}, indent=2) + "\n")
        print(f"== {part}: {ended} ({seconds:.0f} s)", flush=True)
        (folder / "report.md").write_text(report(machine, found))
    print(f"\n{report(machine, found)}\n{folder / 'report.md'}", flush=True)
    return 0 if all(part["ended"] == "done" for part in found.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends the part
    sys.exit(main(sys.argv[1:]))
