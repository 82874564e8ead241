"""Who a party is: its role, its id and its cluster, as the names in its certificate say.

It knows the notation of those names. It verifies nothing: only a certificate that TLS has verified says the truth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from cluster.core.errors import Unauthenticated
from cluster.security.bounds import MAX_PEM_BYTES

ID: Final = re.compile(r"[0-9a-f]{16}")
"""A cluster's or a party's id."""


class Role(StrEnum):
    """What a certificate lets its holder be. A client may ask for answers; an admin may load and drain as well."""

    COORDINATOR = "coordinator"
    WORKER = "worker"
    CLIENT = "client"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Party:
    """One holder of a certificate. ``serial`` is the certificate's own, a positive number of at most 160 bits."""

    role: Role
    id: str
    cluster_id: str
    name: str
    serial: int


def name_of(role: Role, cluster_id: str, id: str = "") -> str:  # noqa: A002
    """The DNS name under which a party is dialled: ``worker.ID.CLUSTER``, or ``worker.CLUSTER`` for any worker."""
    return ".".join(filter(None, (role.value, id, cluster_id)))


def party_of(pem: bytes) -> Party:
    """Who a certificate (PEM, verified by TLS) belongs to; raises ``Unauthenticated`` where it is none of ours."""
    try:
        if len(pem) > MAX_PEM_BYTES:
            raise ValueError("too long")
        return party_in(x509.load_pem_x509_certificate(pem))
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise Unauthenticated("the certificate is not one that a macpipe cluster gives out") from None


def party_in(certificate: x509.Certificate) -> Party:
    """As ``party_of``; raises ``ValueError`` or what x509 raises for extensions that are missing."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    longest, *others = sorted(names.get_values_for_type(x509.DNSName), key=len, reverse=True)
    word, party_id, cluster_id = longest.split(".")
    role = Role(word)
    if len(names) != 2 or others != [name_of(role, cluster_id)]:
        raise ValueError("names that do not belong together")
    if not (ID.fullmatch(party_id) and ID.fullmatch(cluster_id)):
        raise ValueError("ids that are none")
    (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Party(role, party_id, cluster_id, str(common.value), certificate.serial_number)
