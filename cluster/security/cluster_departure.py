"""Takes this machine out of a cluster: deletes its certificates, keys and lists."""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress

from cluster.core.errors import ClusterDamaged, InvalidOption, NoCluster
from cluster.platform.private_files import not_written
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.roles import Role


def leave_cluster(folder: ClusterFolder, *, disband: bool = False) -> tuple[str, ...]:
    """Delete this machine's files of the cluster. Return the names under which it was a member.

    The coordinator still lists them, and refuses them only once they are removed there. ``disband``: delete the files
    also if this machine leads the cluster, which ends it for all. Raises ``NoCluster``, ``InvalidOption``, ``Busy``.
    """
    if not folder.exists:
        raise NoCluster(f"this Mac is in no cluster named {folder.cluster}; nothing was changed")
    if folder.holds_authority and not disband:
        raise InvalidOption(
            f"this Mac leads the cluster {folder.cluster}, and without it no other Mac can use the cluster; to end the"
            " cluster for all, add --disband",
            field="disband",
        )
    names = _member_names(folder)
    gone = folder.path.parent / f".left-{secrets.token_hex(4)}"
    with folder.lock():
        try:
            folder.path.rename(gone)  # at once: half a membership would look like a damaged one
        except OSError as e:
            raise not_written(e, folder.path, "cluster state") from e
    shutil.rmtree(gone, ignore_errors=True)
    return names


def _member_names(folder: ClusterFolder) -> tuple[str, ...]:
    """Return the names by which the coordinator lists this machine, as far as its certificates can be read."""
    names = folder.list_workers()
    others = (Role.CLIENT, Role.ADMIN) if folder.holds_authority else (Role.CLIENT, Role.ADMIN, Role.COORDINATOR)
    for role in others:
        with suppress(ClusterDamaged):  # a damaged membership is a reason to leave
            if keyring := folder.keyring(role):
                names.append(keyring.party.name)
    return tuple(names)
