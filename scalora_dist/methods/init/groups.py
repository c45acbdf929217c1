"""Groups of layers whose sums of ∇W fit a rank's memory. Each group takes one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from scalora_dist.core.arithmetic import ceil_div

Place: TypeAlias = Literal["device", "host"]


class Budget(NamedTuple):
    """Memory of one rank for the sums of one group, in bytes.

    Attributes:
        device: on the device.
        host: in the host's memory. On a CPU rank both are the host's.
    """

    device: int = 0
    host: int = 0

    def at_most(self, total: int) -> Budget:
        """This budget, but no more than ``total`` bytes in all. The device comes first."""
        device = min(self.device, total)
        return Budget(device, min(self.host, total - device))


def sum_bytes(shape: tuple[int, int], ranks: int) -> int:
    """Bytes on a rank of the float32 sum of ∇W (m, n), whose rows are split over the ranks."""
    m, n = shape
    return 4 * ceil_div(m, ranks) * n


def group_layers(sizes: Mapping[str, int], budget: Budget) -> list[dict[str, Place]]:
    """Consecutive layers in groups whose sums fit the budget, and where each sum is.

    A sum is on the device if there is room. A layer that fits nowhere has a group of its own, on
    the device.

    Args:
        sizes: {layer: bytes of its sum}, in model order.
        budget: the same on every rank, so that the groups are.
    """
    groups: list[dict[str, Place]] = []
    room = {"device": 0, "host": 0}
    for name, size in sizes.items():
        if not groups or size > max(room.values()):
            groups.append({})
            room = budget._asdict()
        on_host = room["device"] < size <= room["host"]
        place: Place = "host" if on_host else "device"
        groups[-1][name] = place
        room[place] -= size
    return groups
