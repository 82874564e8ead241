"""Access rules: the roles that may call each method of each service.

A method that is not listed here is closed to everybody, so a new method stays closed until somebody decides who may
call it. The module knows the methods' names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cluster.security.roles import Role

_COORDINATORS: Final = frozenset({Role.COORDINATOR})
_INSPECTORS: Final = frozenset({Role.COORDINATOR, Role.ADMIN})
"""Admins, because ``macpipe plan`` asks workers itself where no coordinator runs."""
_MACS: Final = frozenset({Role.COORDINATOR, Role.WORKER})
_CALLERS: Final = frozenset({Role.CLIENT, Role.ADMIN, Role.COORDINATOR})
"""A coordinator may all that an admin may: it may lead, and then it decides about everything."""
_SENDERS: Final = _CALLERS | {Role.WORKER}
"""Workers too: whoever sits at one of the cluster's Macs may send requests from there and see the cluster's state.

A worker's Mac reads what passes through it anyway. It may change nothing: no model, no worker, no other's request.
"""
_ADMINS: Final = _INSPECTORS

_SERVICES: Final[Mapping[str, Mapping[str, frozenset[Role]]]] = {
    "cluster.v1.WorkerService": {
        "Describe": _INSPECTORS,
        "GrantTerm": _COORDINATORS,
        "NameInSync": _COORDINATORS,
        "JoinGroup": _COORDINATORS,
        "LoadStage": _COORDINATORS,
        "LinkStage": _COORDINATORS,
        "SetAdapters": _COORDINATORS,
        "UnloadStage": _COORDINATORS,
        "OpenPrefixes": _COORDINATORS,
        "ReadPrefix": _COORDINATORS,
        "MeasureLink": _INSPECTORS,
        "MeasureSums": _COORDINATORS,
        "LearnRatio": _COORDINATORS,
        "ResetEngine": _COORDINATORS,
        "DrainWorker": _COORDINATORS,
        "RequestCertificate": _COORDINATORS,
        "InstallCertificate": _COORDINATORS,
        "Examine": _COORDINATORS,
        "ListStored": _COORDINATORS,
        "RemoveStored": _COORDINATORS,
    },
    "cluster.v1.StageService": {
        "Feed": _COORDINATORS,
        "Pull": _MACS,
        "Pulse": _MACS,
        "Probe": frozenset({Role.WORKER}),
    },
    "cluster.v1.StoreService": {
        "DescribeModel": _MACS,
        "ReadFile": _MACS,
        "ListTensors": _MACS,
        "ReadTensors": _MACS,
    },
    "cluster.v1.LeaderService": {
        "Follow": _COORDINATORS,
        "Leads": _COORDINATORS,
        "StoreEdit": _COORDINATORS,
        "PassHttp": _COORDINATORS,
    },
    "cluster.v1.InferenceService": {
        "Generate": _SENDERS,
        "Chat": _SENDERS,
        "Resume": _SENDERS,
        "Embed": _SENDERS,
        "Tokenize": _SENDERS,
        "ListModels": _SENDERS,
        "Abort": _SENDERS,
        "Trace": _SENDERS,
    },
    "cluster.v1.ClusterService": {
        "GetCluster": _SENDERS,
        "Plan": _ADMINS,
        "PlanModels": _ADMINS,
        "LoadModel": _ADMINS,
        "UnloadModel": _ADMINS,
        "Drain": _ADMINS,
        "HandOver": _ADMINS,
        "Train": _ADMINS,
        "AddAdapter": _ADMINS,
        "RemoveAdapter": _ADMINS,
        "RenewCertificate": _CALLERS,  # the leader renews those of its workers itself
        "ExamineCluster": _ADMINS,
        "ListStores": _ADMINS,
        "RemoveFromStores": _ADMINS,
    },
    "cluster.v1.AuthorityService": {
        "CertifyHttp": _COORDINATORS,
        "RenewMember": _COORDINATORS,
        "OfferKey": _COORDINATORS,
        "ReceiveAuthority": _COORDINATORS,
        "RecordMove": _COORDINATORS,
    },
    "grpc.health.v1.Health": {"Check": _SENDERS, "List": _SENDERS, "Watch": _SENDERS},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _CALLERS},
}

RULES: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {f"/{service}/{method}": roles for service, methods in _SERVICES.items() for method, roles in methods.items()}
)
"""Allowed roles by full method name, as in ``/cluster.v1.WorkerService/Describe``."""


def is_allowed(method: str, role: Role) -> bool:
    """Return whether ``role`` may call ``method`` (a full method name); False for an unknown method."""
    return role in RULES.get(method, ())
