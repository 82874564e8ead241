"""Create a cluster: its authority and the first machine's certificates, all of them or none."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.core.errors import InvalidOption
from cluster.platform.private_files import CHOOSE_FOLDER
from cluster.security.admission import Admission
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import MAX_NAME_CHARS
from cluster.security.name_check import check_name
from cluster.security.roles import Party, Role


@dataclass(frozen=True, slots=True)
class CreatedCluster:
    """The new cluster: the fingerprint of its authority, and the parties of the first machine."""

    cluster_id: str
    fingerprint: bytes
    parties: tuple[Party, ...]


def create_cluster(
    folder: ClusterFolder, name: str, ids: Mapping[Role, str], clock: Callable[[], float] = time.time
) -> CreatedCluster:
    """Create the cluster of ``folder``. The machine ``name`` gets a certificate for each role of ``ids``.

    It is built in a draft folder and renamed once it is complete. Raises ``InvalidOption`` if the cluster exists.
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
            raise InvalidOption(f"cannot make {folder.path}: {e.strerror}; {CHOOSE_FOLDER}") from e
    finally:
        shutil.rmtree(draft.home, ignore_errors=True)
    return CreatedCluster(authority.cluster_id, authority.fingerprint, parties)


def name_for_role(role: Role, machine: str) -> str:
    """Return the name of a machine as ``role``. A worker has the machine's own name, since people see it in lists.

    Raises ``InvalidOption`` if the name is too long to add the role.
    """
    name = machine if role is Role.WORKER else f"{machine}-{role}"
    if len(name) > MAX_NAME_CHARS:
        raise InvalidOption(f"{machine[:64]!r} is too long; choose a shorter name with --name", field="name")
    return check_name(name, "this Mac's")


def _check_free(folder: ClusterFolder) -> None:
    if folder.holds_authority:
        raise InvalidOption(
            f"this Mac already leads a cluster named {folder.cluster}; `macpipe token create` admits another Mac"
        )
    if folder.exists:
        raise InvalidOption(
            f"this Mac is already in a cluster named {folder.cluster}; choose another name with --cluster NAME, or"
            f" remove {folder.path}"
        )
