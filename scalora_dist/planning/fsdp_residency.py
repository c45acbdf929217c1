"""Predicts what FSDP2 keeps on one rank and when it gathers weights (measured with torch 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scalora_dist.core.arithmetic import ceil_div
from scalora_dist.engines.fsdp_config import FSDPConfig
from scalora_dist.planning.ranges import Sharding
from scalora_dist.planning.residency import Held, Message, Residency, Weight, others
from scalora_dist.planning.trace import Event


class FSDPResidency(Residency):
    """FSDP2 on a 1-D or a hybrid mesh, with one group of weights per block and one for the rest."""

    sharding: Sharding = "fsdp"

    def __init__(self, config: FSDPConfig, world: int) -> None:
        super().__init__(world)
        self.config = config
        self.blocks: tuple[str, ...] = ()
        self.ranks = config.mesh[-1]

    def see(self, blocks: Sequence[str]) -> None:
        self.blocks = tuple(blocks)

    def share(self, weight: Weight) -> int:
        rows = weight.shape[0] if weight.shape else 1
        return ceil_div(rows, self.ranks) * (weight.numel // max(1, rows))

    def saved(self, weight: Weight) -> float:
        return self.share(weight) * self.ranks / self.world

    def held(self, weights: Sequence[Weight], micro_batches: int) -> Held:
        trained = [weight for weight in weights if weight.trained]
        mine = sum(self.share(weight) for weight in trained)
        held: dict[str, float] = self.kept_parts(weights)
        held |= {"adapters": 4 * mine, "moments": 8 * mine, "gradients": 4 * mine}
        device: dict[str, float] = {}
        host: dict[str, float] = {}
        if self.config.cpu_offload:
            host = held
        else:
            device = held
        if micro_batches > 1:  # until the last micro-batch, full gradients stay on each rank
            device["whole gradients"] = sum(4 * weight.numel for weight in trained)
        return Held(device, host)

    def group(self, module: str) -> str:
        """The name of the block that contains a module, or "" for the rest."""
        return next((b for b in self.blocks if module == b or module.startswith(f"{b}.")), "")

    def group_bytes(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Bytes of each group's full weights, in the dtype in which they are gathered."""
        sizes: dict[str, float] = {}
        for weight in weights:
            group = self.group(weight.module)
            sizes[group] = sizes.get(group, 0) + weight.nbytes
        return sizes

    def gathers(self, weights: Sequence[Weight], events: Sequence[Event]) -> list[float]:
        sizes = self.group_bytes(weights)
        keeps = self.config.reshard_after_forward is False
        group_of = self.config.reshard_after_forward
        # The part of a block that stays on a rank after its forward.
        share = 0.0 if isinstance(group_of, bool) else 1 / group_of
        live: dict[str, float] = {}
        found = []
        for event in events:
            block = event.module if event.module in self.blocks or event.module == "" else None
            copies = 0.0
            if block is not None and not event.recomputed:
                if event.enters:
                    live[block] = sizes.get(block, 0)
                    # The all-gather's buffer exists beside the weights copied out of it. In the
                    # backward, the next block's all-gather already runs.
                    copies = 0.0 if event.backward and not block else sizes.get(block, 0)
                    if event.backward and block:
                        copies += self._before(block, sizes)
                elif event.backward and block:
                    live.pop(block, None)
                elif block and not keeps:
                    live[block] = share * sizes.get(block, 0)
            found.append(sum(live.values()) + copies)
        return found

    def _before(self, block: str, sizes: dict[str, float]) -> float:
        index = self.blocks.index(block)
        return sizes.get(self.blocks[index - 1], 0) if index else 0.0

    def wire(
        self, weights: Sequence[Weight], events: Sequence[Event], micro_batches: int
    ) -> list[Message]:
        reshards = self.config.reshard_after_forward
        gathered = micro_batches * self._gathered(weights, 1 if reshards is False else 2)
        uploaded = 0.0
        if self.config.cpu_offload:  # in the stored dtype, and not again from a smaller group
            stored = [replace(weight, itemsize=weight.stored) for weight in weights]
            uploaded = micro_batches * self._gathered(stored, 2 if reshards is True else 1)
        gradients = sum(4 * weight.numel for weight in weights if weight.trained)
        messages = [
            Message(
                "gathered weights",
                others(self.ranks) * gathered,
                self.ranks,
                uploaded=uploaded / self.ranks,
            ),
            Message("gradients", others(self.ranks) * gradients, self.ranks, summed=True),
        ]
        if self.world > self.ranks:  # an all-reduce of each rank's shard over the replicas
            replicas = self.world // self.ranks
            received = 2 * others(replicas) * gradients / self.ranks
            messages.append(
                Message("gradients of replicas", received, self.world, alike=False, summed=True)
            )
        return messages

    def _gathered(self, weights: Sequence[Weight], passes: int) -> float:
        """Bytes of full weights in a micro-batch whose blocks are gathered ``passes`` times."""
        sizes = self.group_bytes(weights)
        return sizes.get("", 0) + passes * sum(size for group, size in sizes.items() if group)
