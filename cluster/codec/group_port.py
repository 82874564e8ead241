"""Encode and decode where the rank of a group listens. A worker's answer is checked here, before anybody uses it."""

from __future__ import annotations

from itertools import islice

from cluster.core.process_groups import MAX_RDMA_PORTS, GroupPort, RdmaPort, is_rdma_device
from cluster.core.text import HIGHEST_PORT
from cluster.v1 import worker_pb2 as pb

__all__ = ["decode_group_port", "encode_rdma_ports"]


def encode_rdma_ports(port: GroupPort) -> list[pb.RdmaPort]:
    """Encode the RDMA ports of a rank's Mac, as many as ``decode_group_port`` accepts."""
    return [pb.RdmaPort(device=one.device, own=one.own, peer=one.peer) for one in port.rdma_ports[:MAX_RDMA_PORTS]]


def decode_group_port(answer: pb.LoadStageResponse | pb.MeasureSumsResponse) -> GroupPort | None:
    """Return where a rank listens, if its worker says so here. RDMA ports that macOS would not name so are left out."""
    if not 0 < answer.group_port <= HIGHEST_PORT:
        return None
    some = [RdmaPort(port.device, port.own, port.peer) for port in islice(answer.rdma_ports, MAX_RDMA_PORTS)]
    return GroupPort(answer.group_port, tuple(port for port in some if is_rdma_device(port.device)))
