"""What a worker was told is revoked, kept on its disk: its daemon writes it, its engine reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.security.bounds import MAX_REVOKED
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.statefile import StateFile


class Revocations:
    """The serials that ``worker`` of this machine refuses."""

    def __init__(self, folder: ClusterFolder, worker: str) -> None:
        self._file = StateFile(folder, folder.revoked(worker), _pack, _unpack)

    def known(self) -> frozenset[int]:
        """Raises ``ClusterDamaged`` where the file cannot be read: what was revoked must not be forgotten."""
        return frozenset(self._file.rows())

    def learn(self, serials: Iterable[int]) -> None:
        """Know these instead of any before, of which at most ``bounds.MAX_REVOKED`` are kept; writes what is new."""
        told = tuple(sorted(set(serials)))[:MAX_REVOKED]
        if told != self._file.rows():
            with self._file.edit() as edit:
                edit.rows = told


def _pack(serial: int) -> dict[str, Any]:
    return {"serial": f"{serial:x}"}


def _unpack(serial: str) -> int:
    return int(serial, 16)
