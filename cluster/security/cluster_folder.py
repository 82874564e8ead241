"""A cluster's folder on one machine: where its certificates, keys and lists are, and how they are written.

Folders have mode 0700 and files 0600. A file is replaced by rename, so a reader sees the old or the new content. What
the files contain is decided elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.core.errors import Busy, ClusterDamaged
from cluster.platform.private_files import OTHERS, make_private_folder, not_written, replace_file
from cluster.security.keyring import Keyring
from cluster.security.limits import STATE_LOCK_S
from cluster.security.name_check import check_name
from cluster.security.roles import Role

_LOOK_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class ClusterFolder:
    """The folder of ``cluster`` under ``home`` (MACPIPE_HOME). It need not exist."""

    home: Path
    cluster: str

    def __post_init__(self) -> None:
        check_name(self.cluster, "a cluster's")

    @property
    def path(self) -> Path:
        return self.home / "clusters" / self.cluster

    @property
    def exists(self) -> bool:
        """Whether this machine is in the cluster."""
        return self.authority.is_file()

    @property
    def holds_authority(self) -> bool:
        """Whether this machine has the authority's key, with which members are admitted."""
        return self.authority_key.is_file()

    @property
    def coordinates(self) -> bool:
        """Whether this machine may run a coordinator of the cluster: it has a coordinator's certificate."""
        return self.exists and (self.party(Role.COORDINATOR) / "certificate.pem").is_file()

    @property
    def authority(self) -> Path:
        """The authority's certificate. Every party holds it."""
        return self.path / "authority.pem"

    @property
    def authority_key(self) -> Path:
        return self.path / "authority-key.pem"

    @property
    def members(self) -> Path:
        return self.path / "members.json"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.json"

    @property
    def keys(self) -> Path:
        return self.path / "keys.json"

    @property
    def launch_key(self) -> Path:
        """The text of the API key that ``macpipe launch`` uses on this machine."""
        return self.path / "launch-key"

    def party(self, role: Role, name: str = "") -> Path:
        """Return the folder of a party's certificate and key. ``name`` is a worker's; the other roles have none.

        Raises ``InvalidOption`` for an invalid worker name.
        """
        if role is Role.WORKER:
            return self.path / "workers" / check_name(name, "a worker's")
        return self.path / role.value

    def list_workers(self) -> list[str]:
        """Return the names of this machine's workers, sorted, also of those whose files are damaged."""
        workers = self.path / "workers"
        return sorted(one.name for one in workers.iterdir()) if workers.is_dir() else []

    def revoked(self, worker: str) -> Path:
        """Where a worker keeps which serials it was told are revoked."""
        return self.party(Role.WORKER, worker) / "revoked.json"

    def keyring(self, role: Role, name: str = "") -> Keyring | None:
        """Return this machine's keyring as ``role``; None if it has none.

        Raises ``ClusterDamaged`` if the files do not belong together, or if other users of this machine can read the
        key.
        """
        folder = self.party(role, name)
        if not (self.exists and (folder / "certificate.pem").is_file()):
            return None
        key = folder / "key.pem"
        with suppress(FileNotFoundError):
            if key.stat().st_mode & OTHERS:
                raise ClusterDamaged(f"other users of this machine can read {key}; run `chmod 600 {key}`")
        return Keyring.load(folder, self.authority)

    def caller(self) -> Keyring | None:
        """Return the keyring with which this machine calls coordinators: an admin's, else a client's, else None."""
        return self.keyring(Role.ADMIN) or self.keyring(Role.CLIENT)

    def keep(self, role: Role, name: str, *, key: bytes, certificate: bytes) -> None:
        """Write a party's key and certificate. ``Keyring.load`` retries if only one is renewed."""
        folder = self.party(role, name)
        self.write(folder / "key.pem", key)
        self.write(folder / "certificate.pem", certificate)

    def write(self, path: Path, content: bytes) -> None:
        """Write ``content`` to ``path`` (in this folder), whole or not at all. Raises ``InvalidOption`` on failure.

        Missing parent folders are created with mode 0700.
        """
        try:
            make_private_folder(path.parent, self.path.parent)
            replace_file(path, content)
        except OSError as e:
            raise not_written(e, path, "cluster state") from e

    @contextmanager
    def lock(self, wait_s: float = STATE_LOCK_S) -> Iterator[None]:
        """Hold the folder's lock against all other processes and threads. Raises ``Busy`` after ``wait_s``."""
        try:
            make_private_folder(self.path, self.path.parent)
            file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise not_written(e, self.path, "cluster state") from e
        try:
            _acquire(file, wait_s)
            yield
        finally:
            os.close(file)


def _acquire(file: int, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Busy("another macpipe command is editing this cluster; try again", retry_after_s=1.0) from None
        time.sleep(_LOOK_S)
