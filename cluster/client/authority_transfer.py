"""Moves the authority from this Mac to another coordinator's: its calls to that one, and to the one that leads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import grpc

from cluster.core.errors import Unreachable
from cluster.security.authority_move import give_up_authority, seal_authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.members import Member
from cluster.security.trust import COORDINATOR, Trust
from cluster.transport.grpc_setup import control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import authority_pb2 as pb
from cluster.v1.authority_pb2_grpc import AuthorityServiceStub

if TYPE_CHECKING:  # grpc's classes are subscriptable only for type checkers
    Method = grpc.aio.UnaryUnaryMultiCallable

Q = TypeVar("Q")
R = TypeVar("R")
CALL_S: Final = 5.0
"""Deadline of each call: it writes a small file."""
MAX_ADDRESSES: Final = 16
"""Addresses of a coordinator that are tried."""


async def move_authority(
    folder: ClusterFolder, trust: Trust, target: Member, addresses: Sequence[str], leader: Sequence[str]
) -> None:
    """Move the authority of ``folder`` to the coordinator ``target``, which listens at one of ``addresses``.

    ``leader``: addresses of the coordinator that leads, whose roster names the holder; empty if none does. The key is
    deleted here last, once the target has said that it stored it, so that a move that fails may be repeated. Raises
    ``MacpipeError``.
    """
    if not await _send(folder, trust, target, addresses):
        raise Unreachable(
            f"{target.name} does not answer at {', '.join(addresses) or 'any known address'}: start its coordinator, or"
            " name its address with --address HOST:PORT"
        )
    if leader and not await _record(trust, target, leader):
        raise Unreachable(
            f"{target.name} has the authority's key, but the coordinator that leads does not answer at"
            f" {', '.join(leader)}: try again when it does; until then this Mac holds the authority"
        )
    await anyio.to_thread.run_sync(give_up_authority, folder, target)


async def _send(folder: ClusterFolder, trust: Trust, target: Member, addresses: Sequence[str]) -> bool:
    """Send the authority to the first address at which ``target`` proves to be there. Return whether there is one."""
    for address in addresses[:MAX_ADDRESSES]:
        try:
            async with control_channel(trust, address, f"{COORDINATOR}.{target.id}") as channel:
                stub = AuthorityServiceStub(channel)
                offer = await _call(stub.OfferKey, pb.OfferKeyRequest(), address)
                sealed = await anyio.to_thread.run_sync(seal_authority, folder, target, offer.public_key)
                await _call(stub.ReceiveAuthority, pb.ReceiveAuthorityRequest(encrypted=sealed), address)
                return True
        except Unreachable:  # nobody, or another coordinator
            continue
    return False


async def _record(trust: Trust, target: Member, leader: Sequence[str]) -> bool:
    """Have the leader's roster name ``target`` as holder. Return whether it answered."""
    for address in leader[:MAX_ADDRESSES]:
        try:
            async with control_channel(trust, address, COORDINATOR) as channel:
                await _call(AuthorityServiceStub(channel).RecordMove, pb.RecordMoveRequest(holder=target.id), address)
                return True
        except Unreachable:
            continue
    return False


async def _call(method: Method[Q, R], request: Q, address: str) -> R:
    """Return the answer of a call. Raises ``MacpipeError``."""
    try:
        return await method(request, timeout=CALL_S)
    except grpc.RpcError as e:
        raise from_rpc_error(e, address) from None
