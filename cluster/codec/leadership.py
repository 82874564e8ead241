"""Encode and decode who leads a cluster."""

from __future__ import annotations

from typing import Final

from cluster.core.leadership import (
    CoordinatorName,
    CoordinatorRole,
    LeaderClaim,
    LeadershipState,
    Replicate,
    StandbyState,
    StoredEdit,
)
from cluster.v1 import cluster_pb2 as pb
from cluster.v1 import leader_pb2

__all__ = [
    "decode_claim",
    "decode_coordinator",
    "decode_leadership",
    "decode_stored_edit",
    "encode_coordinator",
    "encode_leadership",
    "encode_leads_request",
    "encode_leads_response",
    "encode_stored_edit",
]

_ROLES: Final = {
    CoordinatorRole.LEADER: pb.Leadership.ROLE_LEADER,
    CoordinatorRole.STANDBY: pb.Leadership.ROLE_STANDBY,
    CoordinatorRole.UNKNOWN: pb.Leadership.ROLE_UNSPECIFIED,
}
_MODES: Final = {
    None: pb.Leadership.REPLICATION_UNSPECIFIED,
    Replicate.SYNC: pb.Leadership.REPLICATION_SYNC,
    Replicate.ASYNC: pb.Leadership.REPLICATION_ASYNC,
}
_ROLE_OF: Final = {number: role for role, number in _ROLES.items()}
_MODE_OF: Final = {number: mode for mode, number in _MODES.items()}


def encode_leadership(state: LeadershipState) -> pb.Leadership:
    """Encode who leads."""
    return pb.Leadership(
        role=_ROLES[state.role],
        term=state.term,
        leader=encode_coordinator(state.leader) if state.leader else None,
        since_seconds=state.since_seconds,
        replicate=_MODES[state.replicate],
        standbys=map(_encode_standby, state.standbys),
        others=map(encode_coordinator, state.others),
    )


def decode_leadership(message: pb.Leadership) -> LeadershipState:
    """Decode who leads."""
    return LeadershipState(
        role=_ROLE_OF.get(message.role, CoordinatorRole.UNKNOWN),
        term=message.term,
        leader=decode_coordinator(message.leader) if message.HasField("leader") else None,
        since_seconds=message.since_seconds,
        replicate=_MODE_OF.get(message.replicate),
        standbys=tuple(map(_decode_standby, message.standbys)),
        others=tuple(map(decode_coordinator, message.others)),
    )


def encode_coordinator(name: CoordinatorName) -> pb.Leadership.Coordinator:
    """Encode a coordinator's name and addresses."""
    return pb.Leadership.Coordinator(name=name.name, instance=name.instance, addresses=name.addresses, http=name.http)


def decode_coordinator(message: pb.Leadership.Coordinator) -> CoordinatorName:
    """Decode a coordinator's name and addresses."""
    return CoordinatorName(message.name, message.instance, tuple(message.addresses), tuple(message.http))


def encode_leads_request(claim: LeaderClaim) -> leader_pb2.LeadsRequest:
    """Encode what a coordinator tells another; who leads is asked, not told, unless it does itself."""
    return leader_pb2.LeadsRequest(
        coordinator=encode_coordinator(claim.coordinator),
        role=_ROLES[claim.role],
        term=claim.term,
        problem=claim.problem,
    )


def encode_leads_response(claim: LeaderClaim) -> leader_pb2.LeadsResponse:
    """Encode what a coordinator answers."""
    return leader_pb2.LeadsResponse(
        coordinator=encode_coordinator(claim.coordinator),
        role=_ROLES[claim.role],
        term=claim.term,
        leader=encode_coordinator(claim.leader) if claim.leader else None,
        problem=claim.problem,
    )


def decode_claim(message: leader_pb2.LeadsRequest | leader_pb2.LeadsResponse) -> LeaderClaim:
    """Decode what a coordinator tells."""
    leader = None
    if isinstance(message, leader_pb2.LeadsResponse) and message.HasField("leader"):
        leader = decode_coordinator(message.leader)
    role = _ROLE_OF.get(message.role, CoordinatorRole.UNKNOWN)
    return LeaderClaim(decode_coordinator(message.coordinator), role, message.term, leader, message.problem)


def encode_stored_edit(edit: StoredEdit) -> leader_pb2.StoreEditResponse:
    """Encode which standbys have stored an edit."""
    return leader_pb2.StoreEditResponse(
        stored=map(_encode_standby, edit.stored), missing=map(_encode_standby, edit.missing)
    )


def decode_stored_edit(message: leader_pb2.StoreEditResponse) -> StoredEdit:
    """Decode which standbys have stored an edit."""
    return StoredEdit(tuple(map(_decode_standby, message.stored)), tuple(map(_decode_standby, message.missing)))


def _encode_standby(standby: StandbyState) -> pb.Leadership.Standby:
    return pb.Leadership.Standby(
        name=standby.name,
        addresses=standby.addresses,
        in_sync=standby.in_sync,
        behind=standby.behind,
        problem=standby.problem,
        away=standby.away,
        silent_seconds=standby.silent_seconds,
    )


def _decode_standby(message: pb.Leadership.Standby) -> StandbyState:
    return StandbyState(
        name=message.name,
        addresses=tuple(message.addresses),
        in_sync=message.in_sync,
        behind=message.behind,
        problem=message.problem,
        away=message.away,
        silent_seconds=message.silent_seconds,
    )
