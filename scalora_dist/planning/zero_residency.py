"""Predicts what ZeRO keeps on one rank, and when stage 3 gathers weights.

From the source of DeepSpeed 0.19.8 and from measurements with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.engines.ds_config import gradient_dtype
from scalora_dist.planning.ranges import Sharding
from scalora_dist.planning.residency import Held, Message, Residency, Weight, others
from scalora_dist.planning.trace import Event


class ZeroResidency(Residency):
    """ZeRO stage 0 to 3, with or without offload to the CPU."""

    def __init__(self, config: dict[str, Any], world: int) -> None:
        """
        Args:
            config: a DeepSpeed config without "auto".
        """
        super().__init__(world)
        zero = config.get("zero_optimization", {})
        self.stage = int(zero.get("stage", 0))
        shardings: tuple[Sharding, ...] = ("local", "zero1", "zero1", "zero3")
        self.sharding = shardings[self.stage]
        self.steps_a_buffer = self.stage > 0
        self.bucket = int(zero.get("reduce_bucket_size", 5e8))
        self.overlaps = bool(zero.get("overlap_comm", self.stage == 3))
        self.contiguous = bool(zero.get("contiguous_gradients", True))
        self.persists = int(zero.get("stage3_param_persistence_threshold", 1e5))
        self.prefetch = int(zero.get("stage3_prefetch_bucket_size", 5e7))
        self.most_live = int(zero.get("stage3_max_live_parameters", 1e9))
        self.reuse = int(zero.get("stage3_max_reuse_distance", 1e9))
        self.in_fp32 = gradient_dtype(config) == torch.float32
        self.secondary = min(int(zero.get("zero_hpz_partition_size", 1)), world)
        self.weights_on_host = offloads(zero, "offload_param") and self.stage == 3
        self.states_on_host = offloads(zero, "offload_optimizer")

    def share(self, weight: Weight) -> int:
        return ceil_div(weight.numel, self.world) if self.stage == 3 else weight.numel

    def saved(self, weight: Weight) -> float:
        return ceil_div(weight.numel, self.world)

    def held(self, weights: Sequence[Weight], micro_batches: int) -> Held:
        trained = [weight for weight in weights if weight.trained]
        numel = sum(weight.numel for weight in trained)
        low = sum(weight.nbytes for weight in trained)  # bytes in the compute dtype
        part = self.world if self.stage else 1
        device: dict[str, float] = self.kept_parts(weights)
        host: dict[str, float] = {}
        if self.weights_on_host:
            host, device = device, {}
        masters = 4 * numel / part
        if self.stage == 0:
            masters = 0 if low == 4 * numel else 4 * numel
        adapters = low / self.world if self.stage == 3 else low
        device["adapters"] = device.get("adapters", 0) + adapters
        states = {"masters": masters, "moments": 8 * numel / part}
        gradients = self._gradients(trained)
        if self.states_on_host:
            # Of the masters' dtype and layout. Stage 3 keeps its sums on the host too.
            host |= states | {"gradients": 4 * numel / part}
            if self.stage == 3:
                host["gradients"] += gradients
                gradients = 0.0
        else:
            device |= states
        device["gradients"] = gradients
        device["engine buffers"] = self._buffers(trained)
        if self.stage == 3:
            device["gathered and kept"] = sum(w.nbytes for w in weights if self._persistent(w))
            if self.secondary > 1:
                kept = sum(w.nbytes for w in weights) / self.secondary
                device["secondary shards"] = kept
        # A flat fp32 copy of the gradients, unless they are one already.
        copied = not self.states_on_host and not (self.stage == 2 and self._sums_apart(trained))
        return Held(device, host, during_step=4 * numel / part if copied else 0.0)

    def _sums_apart(self, trained: Sequence[Weight]) -> bool:
        """Whether fp32 sums are kept beside gradients in 16 bits (``sum_gradients_in_fp32``)."""
        return self.in_fp32 and any(weight.itemsize < 4 for weight in trained)

    def _gradients(self, trained: Sequence[Weight]) -> float:
        """Bytes of the gradients that are kept from one micro-batch to the next."""
        low = sum(weight.nbytes for weight in trained)
        if self._sums_apart(trained):
            return sum(4 * weight.numel for weight in trained) / self.world
        # Stage 1 accumulates full gradients. So does stage 2 in fp32.
        return low / self.world if self.stage == 3 else low

    def _buffers(self, trained: Sequence[Weight]) -> float:
        """Bytes of the buckets in which gradients are reduced, and of a bucket's fp32 copy."""
        if not self.stage:
            return 0.0
        apart = self._sums_apart(trained)
        itemsize = max(weight.itemsize for weight in trained)
        numel = sum(weight.numel for weight in trained)
        buckets = 0
        if self.contiguous:
            buckets = 2 if self.overlaps and self.stage < 3 else 1
        if self.stage == 3:  # gradients are copied into a bucket in fp32
            return buckets * self.bucket * (4 if apart else itemsize)
        # Stage 2 casts a full bucket, or a gradient that is larger than a bucket.
        cast = max(min(self.bucket, numel), *(weight.numel for weight in trained))
        return buckets * self.bucket * itemsize + (cast * (itemsize + 4) if apart else 0)

    def _persistent(self, weight: Weight) -> bool:
        return weight.numel <= self.persists

    def gathers(self, weights: Sequence[Weight], events: Sequence[Event]) -> list[float]:
        if self.stage < 3:
            return super().gathers(weights, events)
        return [bytes_ for bytes_, _ in self._coordinate(weights, events)]

    def wire(
        self, weights: Sequence[Weight], events: Sequence[Event], micro_batches: int
    ) -> list[Message]:
        trained = [weight for weight in weights if weight.trained]
        updated = others(self.world) * sum(weight.nbytes for weight in trained)
        gradients = updated
        if self.in_fp32:
            gradients = others(self.world) * sum(4 * weight.numel for weight in trained)
        if self.stage == 0:
            return [Message("gradients", 2 * gradients, self.world, summed=True)]
        if self.stage < 3:  # stage 2 reduces every micro-batch's gradients, by all-reduces
            reductions = micro_batches if self.stage == 2 else 1
            return [
                Message("gradients", 2 * reductions * gradients, self.world, summed=True),
                Message("updated weights", updated, self.world),
            ]
        fetches = [fetched for _, fetched in self._coordinate(weights, events)]
        far, near = micro_batches * sum(fetches), 0.0
        if self.secondary > 1:  # after the step's first forward, each node has a copy
            once = zip(events, fetches, strict=True)
            whole, far = far, sum(fetched for event, fetched in once if not event.backward)
            near = whole - far
        kept = sum(weight.nbytes for weight in trained if self._persistent(weight))
        messages = [
            Message(
                "gathered weights",
                others(self.world) * far,
                self.world,
                uploaded=far / self.world if self.weights_on_host else 0.0,
            ),
            Message("gradients", micro_batches * gradients, self.world, summed=True),
            Message("updated weights", others(self.world) * kept, self.world),
        ]
        if near:
            received = others(self.secondary) * near
            messages.append(Message("weights inside a node", received, self.secondary))
        return messages

    def _coordinate(
        self, weights: Sequence[Weight], events: Sequence[Event]
    ) -> list[tuple[float, float]]:
        """For each event: bytes of gathered weights during it, and bytes fetched at it.

        Follows DeepSpeed's coordinator after it has recorded a step. A weight that is used again
        within ``stage3_max_reuse_distance`` elements is kept. Other weights are freed when their
        module ends. The next ``stage3_prefetch_bucket_size`` elements are fetched ahead. Weights
        that gradient checkpointing fetched to recompute a block are freed when the module ends
        whose backward asked for it, although the block's own backward is still to come.
        """
        owned: dict[str, list[Weight]] = defaultdict(list)
        for weight in weights:
            if not self._persistent(weight):
                owned[weight.module].append(weight)
        order = [event.module for event in events if event.enters and owned[event.module]]
        uses = [(step, weight) for step, name in enumerate(order) for weight in owned[name]]
        step, queued = 0, 0
        live: dict[str, Weight] = {}
        # Modules in their backward, with the frozen weights that were recomputed for them.
        asking: dict[str, list[Weight]] = {}
        found = []
        for event in events:
            fetched: list[Weight] = []
            mine = owned[event.module]
            if mine and event.enters:
                fetched += [weight for weight in mine if weight.name not in live]
                while queued < len(uses) and uses[queued][0] <= step:
                    queued += 1
                elements = sum(weight.numel for weight in live.values())
                room, ahead = min(self.prefetch, self.most_live - elements), 0
                while queued < len(uses) and ahead < room:
                    weight = uses[queued][1]
                    if weight.name not in live and weight not in fetched:
                        fetched.append(weight)
                        ahead += weight.numel
                    queued += 1
                step += 1
                live |= {weight.name: weight for weight in fetched}
            elif mine:
                # A weight that the prefetch has already passed in the queue is not freed either.
                soon = self._used_soon(order[step:], owned)
                soon |= {weight.name for when, weight in uses[:queued] if when >= step}
                for weight in mine:
                    if weight.name not in soon:
                        live.pop(weight.name, None)
            if event.backward and not event.recomputed:
                if event.enters:
                    asking[event.module] = []
                else:
                    for weight in asking.pop(event.module, []):
                        live.pop(weight.name, None)
            elif event.recomputed and event.enters and asking:
                next(reversed(asking.values())).extend(w for w in mine if not w.trained)
            bytes_ = float(sum(weight.nbytes for weight in live.values()))
            found.append((bytes_, float(sum(weight.nbytes for weight in fetched))))
        return found

    def _used_soon(self, order: Sequence[str], owned: dict[str, list[Weight]]) -> set[str]:
        names: set[str] = set()
        passed = 0
        for module in order:
            if passed >= self.reuse:
                break
            for weight in owned[module]:
                names.add(weight.name)
                passed += weight.numel
        return names


def offloads(zero: dict[str, Any], part: str) -> bool:
    """Whether the ``zero_optimization`` section ``zero`` keeps ``part`` on the CPU.

    Args:
        part: ``offload_param`` or ``offload_optimizer``.
    """
    return (zero.get(part) or {}).get("device") == "cpu"
