"""The caller of a public call that a standby passes on: the standby sends the certificate that its caller presented.

A coordinator's certificate alone may assert another's. Only the public services take it; the others have no callers
but Macs of the cluster.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import grpc
from grpc import aio

from cluster.security.roles import Party, Role
from cluster.security.trust import AuthContext, Trust

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
CALLER_METADATA: Final = "x-macpipe-caller-bin"
"""Request metadata: the caller's certificate, as PEM."""
PASSED_SERVICES: Final = ("cluster.v1.InferenceService", "cluster.v1.ClusterService", "grpc.health.v1.Health")
_CERTIFICATE: Final = "x509_pem_cert"


def is_passed(method: str) -> bool:
    """Return whether standbys pass on calls of this method, such as ``/cluster.v1.InferenceService/Chat``."""
    return method.startswith(tuple(f"/{service}/" for service in PASSED_SERVICES))


def connection_certificate(context: grpc.ServicerContext | Context) -> AuthContext:
    """Return what the other end of the connection presented."""
    found: Any = context.auth_context()  # its typing stub is wrong: a name may have several values
    return dict(found)


def passed_certificate(context: Context) -> bytes | None:
    """Return the certificate that a standby asserts of its caller; None if nobody asserts one."""
    metadata: Any = context.invocation_metadata() or ()
    return next((bytes(value) for key, value in metadata if key == CALLER_METADATA), None)


def caller_certificate(trust: Trust, context: Context) -> AuthContext:
    """Return the certificate of who calls a public service, from the connection or as a coordinator asserts it.

    Nothing if another party asserts one.
    """
    shown = connection_certificate(context)
    passed = passed_certificate(context) if trust.me else None
    if passed is None:
        return shown
    return {_CERTIFICATE: (passed,)} if is_coordinator(trust.party(shown)) else {}


def presented_certificate(context: Context) -> bytes | None:
    """Return the certificate that the connection's other end presented, as PEM; None without a cluster."""
    return next(iter(connection_certificate(context).get(_CERTIFICATE, ())), None)


def is_coordinator(party: Party | None) -> bool:
    """Return whether a party is a coordinator of the cluster."""
    return party is not None and party.role is Role.COORDINATOR
