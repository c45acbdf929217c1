"""Rehearses a run on many nodes on one machine: what grows with the number of ranks.

    python tools/rehearse_nodes.py [--engines zero3 fsdp hybrid] [--nodes 2 4 8] [--ranks_of_each 4]

It takes root and iproute2. Each node is a network namespace with its own start of launch/node.sh.
The ranks train a tiny Llama on the CPU. For each engine and number of nodes: the run starts, takes
some steps, and saves. Then all processes of the last node are killed, the other ranks must name
them and end, and half of the nodes resume from the checkpoint. A row has

    start      seconds until the first step is done. All ranks share this machine's cores.
    MiB        memory that a rank has alone: without the pages of libraries that processes share.
    sockets    TCP connections of rank 0, which serves the store under DeepSpeed's launcher, and the
               most of any other rank.
    sent       kB and packets that a node sends in a step, on average over the nodes.
    idle       kB/s that all nodes send while all main threads stand still: the watch.
    save       seconds from the first byte of a checkpoint until it is there.
    death      seconds until all other nodes have ended, and whether they named the dead ranks.
    resume     seconds of the half's start, and how far its next loss is from that of the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.loss_compare import save_odd_model, save_texts
from tools.rehearse.nodes import Node, connected, until

SAVED, STEPS = 6, 4  # the step that is saved, and the number of steps whose traffic is counted
IDLE_SECONDS = 5.0
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def make_task(folder: Path) -> None:
    """A Llama of 0.8 million parameters and texts for it."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    save_odd_model(folder, "llama", **sizes, **heads)
    save_texts(folder, "abcdefgh ", shortest=60, longest=61, count=2000)


def words_of(
    task: Path, run: Path, engine: str, nodes: int, ranks_of_each: int, batch: int
) -> list[str]:
    """The options of a run with ``batch`` examples in a step."""
    given: dict[str, Any] = {
        "model_name_or_path": task,
        "dataset": task / "texts.jsonl",
        "output_dir": run,
        "max_length": 32,
        "rank": 4,
        "learning_rate": 1e-3,
        "max_steps": 100_000,
        "train_batch_size": batch,
        "per_device_train_batch_size": 1,
        "save_steps": SAVED,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    if engine == "zero3":
        return [*words, "--ds_config", "zero3"]
    if engine == "fsdp":
        return [*words, "--fsdp"]
    mesh = run.with_suffix(".yaml")
    mesh.write_text(f"mesh_shape: [{nodes}, {ranks_of_each}]\n")
    return [*words, "--fsdp", "--fsdp_config", str(mesh)]


class Rehearsal:
    """One engine on some nodes: the run, its end, and its resume on half of them."""

    def __init__(self, task: Path, folder: Path, engine: str, nodes: list[Node], each: int) -> None:
        self.task, self.run, self.engine = task, folder / "run", engine
        self.nodes, self.each = nodes, each

    def measure(self) -> dict[str, Any]:
        """The row of the table."""
        started = self.start(self.nodes)
        until(lambda: self.partial().exists() or self.saved(), self.nodes)
        begun = time.monotonic()
        until(self.saved, self.nodes)
        row: dict[str, Any] = {"start": started, "save": time.monotonic() - begun}
        row |= self.traffic() | self.memory_and_sockets()
        row |= self.idle() | self.death()
        before = self.losses()
        for folder in self.run.glob("checkpoint-*"):
            if folder.name != f"checkpoint-{SAVED}":
                shutil.rmtree(folder)
        row["resume"] = self.start(self.nodes[: len(self.nodes) // 2], resumed=True)
        row["differs"] = abs(self.losses()[SAVED] - before[SAVED])
        for node in self.nodes:
            node.die()
        return row

    def start(self, nodes: list[Node], *, resumed: bool = False) -> float:
        """Start the run on ``nodes``. Returns the seconds until its first step is done."""
        batch = 2 * len(self.nodes) * self.each  # two micro-batches a rank; four on half of them
        words = words_of(self.task, self.run, self.engine, len(nodes), self.each, batch)
        words += ["--resume_from_checkpoint", "latest"] if resumed else []
        launcher = "deepspeed" if self.engine == "zero3" else "torchrun"
        begun = time.monotonic()
        for node in nodes:
            caches = {"HF_DATASETS_CACHE": self.run.parent / f"cache{node.number}"}
            node.launch(
                words, len(nodes), self.each, {**ENVIRONMENT, **caches, "LAUNCHER": launcher}
            )
        if resumed:  # its first step cuts the metrics back
            until(lambda: "going on from" in nodes[0].text(), nodes, 900)
            until(lambda: len(self.losses()) == SAVED + 1, nodes, 900)
        else:
            until(self.losses, nodes, 900)
        return time.monotonic() - begun

    def losses(self) -> list[float]:
        """The losses of the steps whose lines are whole."""
        try:
            text = (self.run / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
        return [line["loss"] for line in lines if "loss" in line]

    def partial(self) -> Path:
        return self.run / f"checkpoint-{SAVED}.partial"

    def saved(self) -> bool:
        return (self.run / f"checkpoint-{SAVED}").exists()

    def traffic(self) -> dict[str, float]:
        """What a node sends in a step."""
        first, before = len(self.losses()), self.sent()
        until(lambda: len(self.losses()) >= first + STEPS, self.nodes)
        steps = len(self.losses()) - first
        return {
            name: (count - before[name]) / steps / len(self.nodes)
            for name, count in self.sent().items()
        }

    def sent(self) -> dict[str, int]:
        every = [node.traffic()["tx"] for node in self.nodes]
        return {name: sum(each[name] for each in every) for name in ("bytes", "packets")}

    def ranks(self) -> list[psutil.Process]:
        """The processes of all ranks."""
        found = []
        for node in self.nodes:
            for pid in node.processes():
                process = psutil.Process(pid)
                if "RANK" in (environ := process.environ()) and "WORLD_SIZE" in environ:
                    found.append((int(environ["RANK"]), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def memory_and_sockets(self) -> dict[str, float]:
        ranks = self.ranks()
        sockets = [connections(rank.pid) for rank in ranks]
        return {
            "MiB": mean(rank.memory_full_info().uss for rank in ranks) / 2**20,
            "sockets of rank 0": sockets[0],
            "most sockets": max(sockets[1:]),
        }

    def idle(self) -> dict[str, float]:
        """The bytes that all nodes send in a second while all ranks wait for the last one."""
        last = self.ranks()[-1]
        last.send_signal(signal.SIGSTOP)
        time.sleep(2)
        before = self.sent()["bytes"]
        time.sleep(IDLE_SECONDS)
        sent = self.sent()["bytes"] - before
        last.send_signal(signal.SIGCONT)
        return {"idle": sent / IDLE_SECONDS}

    def death(self) -> dict[str, Any]:
        """Kill the last node, and wait for the others."""
        *others, last = self.nodes
        begun = time.monotonic()
        last.die()
        for node in others:
            node.wait()
        seconds = time.monotonic() - begun
        said = "\n".join(error for node in others for error in node.errors())
        named = re.search(r"ranks? ([\d-]+) stopped answering", said)
        first, _, end = named[1].partition("-") if named else ("-1", "", "")
        dead = range(len(others) * self.each, len(self.nodes) * self.each)
        right = {int(first), int(end or first)} <= {*dead}
        if not right:
            print(f"the other nodes said: {said}", file=sys.stderr)
        return {"death": seconds, "named": right}


def connections(pid: int) -> int:
    """The number of a process's TCP connections, in its own namespace."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    established = {f"socket:[{line[9]}]" for line in lines if line[3] == "01"}
    files = Path(f"/proc/{pid}/fd").iterdir()
    return sum(str(file.readlink()) in established for file in files)


HEADS = (
    "engine",
    "nodes × ranks",
    "start, s",
    "MiB a rank",
    "sockets of rank 0, others",
    "sent a step: kB, packets",
    "idle, kB/s",
    "save, s",
    "death, s",
    "resume on half, s",
    "next loss differs",
)


def line(engine: str, nodes: int, each: int, row: dict[str, Any]) -> str:
    cells = (
        engine,
        f"{nodes} × {each}",
        f"{row['start']:.0f}",
        f"{row['MiB']:.0f}",
        f"{row['sockets of rank 0']}, {row['most sockets']}",
        f"{row['bytes'] / 1e3:,.0f}, {row['packets']:,.0f}",
        f"{row['idle'] / 1e3:.1f}",
        f"{row['save']:.1f}",
        f"{row['death']:.1f}" + ("" if row["named"] else ", not named"),
        f"{row['resume']:.0f}",
        f"{row['differs']:.0e}",
    )
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", nargs="+", default=["zero3", "fsdp", "hybrid"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--ranks_of_each", type=int, default=4)
    args = parser.parse_args(words)
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        task = Path(name) / "task"
        make_task(task)
        for engine in args.engines:
            for count in args.nodes:
                folder = Path(name) / f"{engine}-{count}"
                folder.mkdir()
                with connected(count, folder, Node) as nodes:
                    rehearsal = Rehearsal(task, folder, engine, nodes, args.ranks_of_each)
                    print(line(engine, count, args.ranks_of_each, rehearsal.measure()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
