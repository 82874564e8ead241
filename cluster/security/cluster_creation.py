"""How a cluster begins: its authority, and the first machine's own certificates, all of them or none."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.core.errors import InvalidOption
from cluster.security.admission import Admission
from cluster.security.authority import Authority
from cluster.security.bounds import MAX_NAME_CHARS
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.name_check import check_name
from cluster.security.roles import Party, Role


@dataclass(frozen=True, slots=True)
class CreatedCluster:
    """The new cluster: its authority's fingerprint, and what the first machine is in it."""

    cluster_id: str
    fingerprint: bytes
    parties: tuple[Party, ...]


def create_cluster(
    folder: ClusterFolder, name: str, ids: Mapping[Role, str], clock: Callable[[], float] = time.time
) -> CreatedCluster:
    """Make the cluster of ``folder``, led by the machine ``name``, which is all the roles of ``ids``.

    It is made beside its place and moved there when it is whole. Raises ``InvalidOption`` where one is there already.
    """
    own = {role: name_for_role(role, name) for role in ids}
    _check_free(folder)
    draft = ClusterFolder(folder.path.parent / f".making-{secrets.token_hex(4)}", folder.cluster)
    try:
        authority = Authority.make(draft, clock())
        admission = Admission(draft, clock)
        parties = tuple(admission.certify_own(role, ids[role], own[role]) for role in ids)
        try:
            draft.path.rename(folder.path)
        except OSError as e:
            _check_free(folder)
            raise InvalidOption(f"cannot make {folder.path}: {e.strerror}") from e
    finally:
        shutil.rmtree(draft.home, ignore_errors=True)
    return CreatedCluster(authority.cluster_id, authority.fingerprint, parties)


def name_for_role(role: Role, machine: str) -> str:
    """What a machine is called as ``role``: a worker by its own name, since that is who people see at work.

    Raises ``InvalidOption`` for a name that leaves no room for the rest.
    """
    name = machine if role is Role.WORKER else f"{machine}-{role}"
    if len(name) > MAX_NAME_CHARS:
        raise InvalidOption(f"{machine[:64]!r} is too long; choose a shorter name with --name", field="name")
    return check_name(name, "this Mac's")


def _check_free(folder: ClusterFolder) -> None:
    if folder.leads:
        raise InvalidOption(
            f"this Mac leads a cluster named {folder.cluster} already; `macpipe token create` admits another Mac"
        )
    if folder.exists:
        raise InvalidOption(
            f"this Mac is in a cluster named {folder.cluster} already; choose another name with --cluster NAME, or"
            f" remove {folder.path}"
        )
