"""The revoked serials that a worker knows, kept on its disk. Its daemon writes the file, its engine reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import MAX_REVOKED
from cluster.security.state_file import StateFile


class Revocations:
    """The serials that ``worker`` of this machine refuses."""

    def __init__(self, folder: ClusterFolder, worker: str) -> None:
        self._file = StateFile(folder, folder.revoked(worker), _pack, _unpack)

    def known(self) -> frozenset[int]:
        """Return the revoked serials. Raises ``ClusterDamaged`` if the file cannot be read: none may be forgotten."""
        return frozenset(self._file.rows())

    def learn(self, serials: Iterable[int]) -> None:
        """Add serials. None is forgotten, since another coordinator may not know of it yet.

        Of more than ``MAX_REVOKED`` in all, those that were told first are dropped: their certificates expire first.
        Writes the file only if a serial is new.
        """
        told = sorted(set(serials))[:MAX_REVOKED]
        if not self.known().issuperset(told):
            with self._file.edit() as edit:
                edit.rows = (*(one for one in edit.rows if one not in told), *told)[-MAX_REVOKED:]


def _pack(serial: int) -> dict[str, Any]:
    return {"serial": f"{serial:x}"}


def _unpack(serial: str) -> int:
    return int(serial, 16)
