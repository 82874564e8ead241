"""Parties: the role, id and cluster of a certificate's holder, as the names in the certificate say.

The module knows the format of those names. It verifies nothing: TLS must have verified the certificate before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

from cryptography import x509
from cryptography.x509.oid import NameOID

from cluster.core.errors import Unauthenticated
from cluster.security.limits import MAX_PEM_BYTES

ID: Final = re.compile(r"[0-9a-f]{16}")
"""Format of a cluster's or a party's id."""


class Role(StrEnum):
    """A role in the cluster. A client may send requests; an admin may also load models and drain workers."""

    COORDINATOR = "coordinator"
    WORKER = "worker"
    CLIENT = "client"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Party:
    """The holder of a certificate. ``serial`` is the certificate's, a positive number of at most 160 bits."""

    role: Role
    id: str
    cluster_id: str
    name: str
    serial: int


class Named(Protocol):
    """Whatever has a coordinator's name."""

    @property
    def name(self) -> str:
        """Return the coordinator's own name."""


N = TypeVar("N", bound=Named)


def coordinators_named(name: str, among: Iterable[N]) -> list[N]:
    """Return the coordinators that ``name`` means: those of this name, else those of the Mac of this name."""
    known = list(among)
    exact = [one for one in known if one.name == name]
    return exact or [one for one in known if one.name == f"{name}-{Role.COORDINATOR}"]


def name_of(role: Role, cluster_id: str, id: str = "") -> str:  # noqa: A002
    """Return the DNS name of a party: ``worker.ID.CLUSTER``, or ``worker.CLUSTER`` for any worker."""
    return ".".join(filter(None, (role.value, id, cluster_id)))


def read_party(pem: bytes) -> Party:
    """Return the party of a certificate (PEM, verified by TLS). Raises ``Unauthenticated`` if it is not a cluster's."""
    try:
        if len(pem) > MAX_PEM_BYTES:
            raise ValueError("too long")
        return party_of_certificate(x509.load_pem_x509_certificate(pem))
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise Unauthenticated("the certificate was not issued by a macpipe cluster") from None


def party_of_certificate(certificate: x509.Certificate) -> Party:
    """Return the party of a certificate. Raises ``ValueError``, or x509's errors for missing extensions."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    longest, *others = sorted(names.get_values_for_type(x509.DNSName), key=len, reverse=True)
    word, party_id, cluster_id = longest.split(".")
    role = Role(word)
    if len(names) != 2 or others != [name_of(role, cluster_id)]:
        raise ValueError("the names do not belong together")
    if not (ID.fullmatch(party_id) and ID.fullmatch(cluster_id)):
        raise ValueError("the party's id or the cluster's is invalid")
    (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Party(role, party_id, cluster_id, str(common.value), certificate.serial_number)
