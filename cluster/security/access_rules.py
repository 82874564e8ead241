"""Who may call what: for every method of every service, the roles whose certificates allow it.

What is not listed here nobody may call, so a new method is closed until somebody decides who it is for. It knows the
names of methods and nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cluster.security.roles import Role

_LEAD: Final = frozenset({Role.COORDINATOR})
_LOOK: Final = frozenset({Role.COORDINATOR, Role.ADMIN})
"""What ``macpipe plan`` asks of workers where no coordinator runs, beside what coordinators do."""
_MACS: Final = frozenset({Role.COORDINATOR, Role.WORKER})
_ASK: Final = frozenset({Role.CLIENT, Role.ADMIN})
_RULE: Final = frozenset({Role.ADMIN})

_SERVICES: Final[Mapping[str, Mapping[str, frozenset[Role]]]] = {
    "cluster.v1.WorkerService": {
        "Describe": _LOOK,
        "LoadStage": _LEAD,
        "LinkStage": _LEAD,
        "UnloadStage": _LEAD,
        "MeasureLink": _LOOK,
        "LearnRatio": _LEAD,
        "ResetEngine": _LEAD,
        "DrainWorker": _LEAD,
        "RequestCertificate": _LEAD,
        "InstallCertificate": _LEAD,
    },
    "cluster.v1.StageService": {
        "Feed": _LEAD,
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
    "cluster.v1.InferenceService": {
        "Generate": _ASK,
        "Chat": _ASK,
        "Resume": _ASK,
        "Tokenize": _ASK,
        "ListModels": _ASK,
        "Abort": _ASK,
    },
    "cluster.v1.ClusterService": {
        "GetCluster": _ASK,
        "Plan": _RULE,
        "LoadModel": _RULE,
        "UnloadModel": _RULE,
        "Drain": _RULE,
        "RenewCertificate": _ASK,
    },
    "grpc.health.v1.Health": {"Check": _ASK, "List": _ASK, "Watch": _ASK},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _ASK},
}

RULES: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {f"/{service}/{method}": roles for service, methods in _SERVICES.items() for method, roles in methods.items()}
)
"""By the full method, as in ``/cluster.v1.WorkerService/Describe``."""


def is_allowed(method: str, role: Role) -> bool:
    return role in RULES.get(method, ())
