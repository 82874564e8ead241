"""Notices that this Mac was removed from its cluster, as its own lists say, and tells what to do about it."""

from __future__ import annotations

import asyncio
import logging

from cluster.core.errors import MacpipeError, MemberRemoved
from cluster.security.limits import REVOCATION_LOOK_S
from cluster.security.trust import COORDINATOR, Trust

__all__ = ["await_removal", "removed_error", "require_member", "was_removed"]

log = logging.getLogger(__name__)


def removed_error(cluster: str, role: str, why: str = "") -> MemberRemoved:
    """Return the error with which a removed member ends. ``why`` is who said so."""
    token = "macpipe token create" + (f" --role {role}" if role == COORDINATOR else "")
    return MemberRemoved(
        f"this Mac was removed from the cluster {cluster}{f' ({why})' if why else ''}; to let it in again, run "
        f"`{token}` on the Mac with the cluster's authority, and here the `macpipe join` line that it prints"
    )


def was_removed(trust: Trust) -> bool:
    """Return whether this process's own certificate is revoked. A list that cannot be read removes nobody."""
    try:
        return trust.revoked(trust.serial)
    except MacpipeError:
        return False


def require_member(trust: Trust, cluster: str, role: str) -> None:
    """Raise ``MemberRemoved`` if this process's own certificate is revoked, and ``ClusterDamaged``."""
    if trust.revoked(trust.serial):
        raise removed_error(cluster, role)


async def await_removal(trust: Trust, cluster: str, role: str) -> None:
    """Look at the lists, which others may edit, for as long as this process runs. Raises ``MemberRemoved``.

    A list that cannot be read removes nobody. Returns at once without a cluster.
    """
    while trust.me:
        try:
            require_member(trust, cluster, role)
        except MemberRemoved:
            raise
        except MacpipeError as e:
            log.debug("removal: list not read reason=%s", e.sentence)
        await asyncio.sleep(REVOCATION_LOOK_S)
