"""Find the RDMA devices that connect the ranks of a group, from what each Mac says of its Thunderbolt ports. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.process_groups import RdmaPort

__all__ = ["match_devices"]


def match_devices(ports: Sequence[Sequence[RdmaPort]]) -> tuple[tuple[str, ...], ...]:
    """Return the device of each rank towards each other rank; "" where no cable connects both.

    ``ports`` are those of each rank. Return () unless every rank reaches the ranks before and after it: a full mesh,
    or a ring. Of several cables between two Macs, both ends use the same one.
    """
    count = len(ports)
    devices = tuple(tuple(_device(ports[i], ports[j]) if i != j else "" for j in range(count)) for i in range(count))
    complete = all(devices[i][j] for i in range(count) for j in ((i - 1) % count, (i + 1) % count))
    return devices if complete else ()


def _device(own: Sequence[RdmaPort], other: Sequence[RdmaPort]) -> str:
    """Return one Mac's device of its cable to another one. Cables are ordered by their ids, which both ends know."""
    ends = {(port.own, port.peer) for port in other}
    cables = [(min(port.own, port.peer), port.device) for port in own if (port.peer, port.own) in ends]
    return min(cables)[1] if cables else ""
