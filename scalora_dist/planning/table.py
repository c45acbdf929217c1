"""Formats a plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scalora_dist.config.options import Options
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.planning.least_times import LeastTimes
from scalora_dist.planning.plan import GIB, Plan
from scalora_dist.profiling.gpus import GPUS


def describe(options: Options, where: PlanArguments) -> str:
    """The run and the cluster, in two lines."""
    train, method, launch = options.train, options.method, options.launch
    engine = launch.ds_config or (
        f"FSDP2 {launch.fsdp_config or ''}" if launch.fsdp else "no engine"
    )
    dtype = str(train.dtype).removeprefix("torch.")
    bits = ", base in 4 bits" if options.model.load_in_4bit else ""
    checkpoints = "with" if train.gradient_checkpointing else "without"
    return (
        f"{where.model}: {method.name}, r = {method.rank}, {dtype}{bits}, {engine.strip()}\n"
        f"{where.nodes} node(s) × {where.gpus_per_node} {GPUS[where.gpu].name}; "
        f"{train.gradient_accumulation_steps} × {train.per_device_train_batch_size} examples of "
        f"{options.data.max_length} tokens a GPU and step, {checkpoints} gradient checkpointing"
        f"{', activations on the host' if train.activation_offloading else ''}"
        f"{', compiled blocks' if train.torch_compile else ''}"
    )


def render(plan: Plan, times: LeastTimes, where: PlanArguments) -> str:
    """Tables of memory by part and phase, of messages, and of least times."""
    names = list(dict.fromkeys(name for moment in plan.phases for name in moment.parts))
    unit, size = ("GiB", GIB) if plan.peak.total > 4 * GIB else ("MiB", 2**20)

    def row(name: str, sizes: Iterable[float]) -> list[str]:
        return [name, *(f"{x / size:.2f}" if x >= size / 200 else "" for x in sizes)]

    rows = [row(name, (m.parts.get(name, 0) for m in plan.phases)) for name in names]
    table = [
        [f"{unit} of a GPU", *(moment.phase for moment in plan.phases)],
        *(cells for cells in rows if any(cells[1:])),
        row("in all", (moment.total for moment in plan.phases)),
    ]
    host = plan.held.host
    kept = [row(name, [host[name]]) for name in host if row(name, [host[name]])[1]]
    table_of_host = [[f"{unit} of the host for each GPU", ""], *kept]
    table_of_host.append(row("in all", [sum(host.values())]))
    text = f"{_columns(table)}\n\n{_columns(table_of_host)}"
    named = [(m.what, m) for m in plan.messages]
    named += [(f"{m.what}, in a rescale", m) for m in plan.rescale]
    wire = [[name, _billions(m.received), f"{m.ranks} ranks"] for name, m in named]
    if wire and plan.world > 1:
        text += "\n\n" + _columns([["10⁹ bytes a GPU receives in a step", "", ""], *wire])
    tokens = plan.options.train.gradient_accumulation_steps * plan.options.data.max_length
    tokens *= plan.options.train.per_device_train_batch_size
    compiled, launches = plan.options.train.torch_compile, f"{times.launches:.2g}"
    rows = [
        ["least seconds of a step", ""],
        [f"products, {plan.flops / 1e12:.1f} TFLOP", f"{times.compute:.2g}"],
        [f"reading weights, {plan.reads / 1e9:.0f} GB", f"{times.memory:.2g}"],
        ["messages inside a node", f"{times.links:.2g}"],
        ["messages between nodes", f"{times.network:.2g}"],
        [f"launching kernels{', not of compiled blocks' if compiled else ''}", launches],
        *_bus("copies to and from the host, {} GB", plan.copied, times.bus),
        ["a rescale's messages", f"{times.rescale:.2g}"],
        ["launching a rescale's kernels", f"{times.rescale_launches:.2g}"],
        *_bus("a rescale's copies, {} GB each way", plan.rescale_copied, times.rescale_bus),
        ["so at most, tokens/s of all GPUs", f"{plan.world * tokens / times.step:,.0f}"],
    ]
    return f"{text}\n\n{_columns(rows)}"


def _billions(received: float) -> str:
    """In 10⁹, with three decimals; a number that these would make 0 has one digit."""
    return f"{received / 1e9:.3f}" if received >= 1e6 or not received else f"{received / 1e9:.0e}"


def _bus(what: str, copied: float, seconds: float) -> list[list[str]]:
    """The row of copies over the bus; none if there are no copies."""
    return [[what.format(f"{copied / 1e9:.1f}"), f"{seconds:.2g}"]] if copied else []


def verdict(plan: Plan, fits: bool, where: PlanArguments) -> str:
    gpu, peak = GPUS[where.gpu], plan.peak
    room = gpu.memory_gib - where.reserve
    says = "fits" if fits else "DOES NOT FIT"
    return (
        f"{says}: {peak.total / GIB:.1f} GiB in the {peak.phase}, of {room:.1f} "
        f"({gpu.memory_gib} less {where.reserve} for CUDA and NCCL)"
    )


def as_json(plan: Plan, times: LeastTimes, fits: bool) -> dict[str, Any]:
    return {
        "world_size": plan.world,
        "fits": fits,
        "peak_bytes": plan.peak.total,
        "peak_phase": plan.peak.phase,
        "phases": {m.phase: {"total": m.total, **m.parts} for m in plan.phases},
        "host_bytes": sum(plan.held.host.values()),
        "host": plan.held.host,
        "received_bytes": {m.what: m.received for m in plan.messages},
        "rescale_received_bytes": {m.what: m.received for m in plan.rescale},
        "flops": plan.flops,
        "trained_parameters": plan.trained,
        "launches": plan.launches,
        "rescale_launches": plan.rescale_launches,
        "copied_bytes": plan.copied,
        "rescale_copied_bytes": plan.rescale_copied,
        "least_seconds": {**vars(times), "step": times.step},
    }


def _columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        right = "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True))
        lines.append(f"  {name:<{widths[0]}}{right}".rstrip())
    return "\n".join(lines)
