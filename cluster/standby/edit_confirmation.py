"""Have the leader and its standbys store what a command has edited on this Mac, so that no take-over undoes it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from cluster.codec.leadership import decode_stored_edit
from cluster.coordinator.identity import state_folder
from cluster.coordinator.state_files import state_files
from cluster.core.errors import MacpipeError, Unreachable
from cluster.core.leadership import CoordinatorName, StoredEdit
from cluster.core.limits import CONTROL_TIMEOUT_S, DEFAULT_COORDINATOR_PORT
from cluster.core.replication_limits import CONFIRM_S
from cluster.core.text import format_address
from cluster.discovery.interfaces import LOOPBACK
from cluster.security.cluster_choice import remembered_coordinator
from cluster.security.credentials import open_trust
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.leads_client import ask_over
from cluster.standby.other_coordinators import OtherCoordinators
from cluster.transport.grpc_setup import control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import leader_pb2 as pb
from cluster.v1.leader_pb2_grpc import LeaderServiceStub

__all__ = ["confirm_edit"]


def confirm_edit(home: Path, cluster: str, name: str) -> StoredEdit | None:
    """Have the file with this name stored by the coordinator that leads, and by its standbys.

    Return which standbys have it; None if this Mac's coordinator never knew another one. Raises ``Unreachable`` if no
    leader answers, and the leader's error.
    """
    file = state_folder(home, cluster) / "coordinators"
    return asyncio.run(_confirm(home, cluster, name, file)) if file.is_file() else None


async def _confirm(home: Path, cluster: str, name: str, file: Path) -> StoredEdit:
    trust = open_trust(home, cluster, COORDINATOR)
    others = OtherCoordinators(CoordinatorName("", ""), ask_over(trust), file)
    here = remembered_coordinator(home, cluster), format_address(LOOPBACK, DEFAULT_COORDINATOR_PORT)
    leader = await others.find_leader((*filter(None, here), *others.addresses))
    if leader is None:
        why = f" ({others.failures[0].sentence})" if others.failures else ""
        raise Unreachable(f"no coordinator of cluster {cluster} says that it leads{why}")
    content = state_files(home, cluster)[name].read_bytes()
    return await _store(trust, leader, pb.ReplicatedFile(name=name, content=content))


async def _store(trust: Trust, leader: CoordinatorName, file: pb.ReplicatedFile) -> StoredEdit:
    """Send a file to the leader, at the first of its addresses that answers."""
    error: MacpipeError = Unreachable(f"{leader.name} leads, but names no address")
    for address in leader.addresses:
        async with control_channel(trust, address, COORDINATOR) as channel:
            call = LeaderServiceStub(channel).StoreEdit
            try:
                answer = await call(pb.StoreEditRequest(file=file), timeout=CONFIRM_S + CONTROL_TIMEOUT_S)
            except grpc.aio.AioRpcError as e:
                error = from_rpc_error(e, address, peer="leader")
                continue
            return decode_stored_edit(answer)
    raise error
