"""Issue certificates to members: by the authority on this Mac, or through the coordinator on whose Mac it is."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import anyio.to_thread

from cluster.core.errors import InvalidRequest

if TYPE_CHECKING:
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.members import Members
    from cluster.security.roles import Role

__all__ = ["AskHolder", "CertificateIssuer"]

AskHolder: TypeAlias = Callable[["Role", str, bytes], Awaitable[bytes]]
"""Have the authority's holder renew the certificate of a member (role, id) by its request (PEM). Raises its error."""


class CertificateIssuer:
    """The issuer of a coordinator with the files of ``folder``, whose roster is ``members``."""

    def __init__(
        self,
        folder: ClusterFolder,
        members: Members,
        ask_holder: AskHolder,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._members, self._ask_holder, self._clock = folder, members, ask_holder, clock

    async def renew(self, role: Role, id: str, request: bytes) -> bytes:  # noqa: A002
        """Return a new certificate (PEM) for a member, which this Mac's roster then has.

        Raises as ``renew_certificate``, and ``Unreachable`` if the holder does not answer.
        """
        from cluster.security.authority import find_holder
        from cluster.security.certificate_renewal import renew_certificate

        holder = await anyio.to_thread.run_sync(find_holder, self._folder, self._members)
        if holder.here:
            certify = partial(renew_certificate, self._folder, role, id, request, self._clock())
            return await anyio.to_thread.run_sync(certify)
        certificate = await self._ask_holder(role, id, request)
        await anyio.to_thread.run_sync(self._record, role, id, certificate)
        return certificate

    def _record(self, role: Role, id: str, certificate: bytes) -> None:  # noqa: A002
        """Note a certificate at once: the holder's roster takes a second to arrive, and the member uses it sooner."""
        from cluster.security.keyring import read_certificate

        party, ends = read_certificate(certificate)
        if (party.role, party.id) != (role, id):
            raise InvalidRequest(f"the authority certified {party.role} {party.id} in place of {role} {id}")
        self._members.renew(party, ends)
