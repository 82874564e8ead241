"""The files of a coordinator's state, and which of them changed, so that its standbys can have the same.

They are small, and replaced as a whole. The journal is not among them: its records are sent one by one.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from cluster.coordinator.identity import state_folder
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.file_version import Stamp, file_version
from cluster.security.limits import MAX_STATE_BYTES
from cluster.security.members import Members

__all__ = ["EPOCH_FILE", "ID_FILE", "KEYS_FILE", "MEMBERS_FILE", "StateFiles", "adopt_edit", "state_files"]

ID_FILE: Final = "id"
EPOCH_FILE: Final = "epoch"
KEYS_FILE: Final = "keys.json"
MEMBERS_FILE: Final = "members.json"


def state_files(home: Path, cluster: str) -> dict[str, Path]:
    """Return where the files are, by the names under which they are sent."""
    own, shared = state_folder(home, cluster), ClusterFolder(home, cluster)
    return {
        ID_FILE: own / "id",
        EPOCH_FILE: own / "epoch",
        KEYS_FILE: shared.keys,
        MEMBERS_FILE: shared.members,
    }


def adopt_edit(home: Path, cluster: str, name: str, content: bytes) -> None:
    """Take over a file that somebody edited on a standby's Mac. Those that only the leader writes are ignored.

    Raises the error of a damaged file, and of one that cannot be written.
    """
    shared = ClusterFolder(home, cluster)
    if not shared.exists or len(content) > MAX_STATE_BYTES:
        return
    if name == MEMBERS_FILE:
        Members(shared).merge(content)
    elif name == KEYS_FILE and not shared.holds_authority:
        shared.write(shared.keys, content)


class StateFiles:
    """The files of one coordinator, which other processes may edit."""

    def __init__(self, home: Path, cluster: str) -> None:
        self._paths = state_files(home, cluster)
        self._found: dict[str, Stamp | None] = {}

    def read_changed(self) -> dict[str, bytes | None]:
        """Return the content of the files that have changed since the last call, None for those that do not exist.

        One that cannot be read counts as unchanged.
        """
        changed: dict[str, bytes | None] = {}
        for name, path in self._paths.items():
            with suppress(OSError):
                found = _version(path)
                if name not in self._found or found != self._found[name]:
                    changed[name] = path.read_bytes()[:MAX_STATE_BYTES] if found else None
                    self._found[name] = found
        return changed


def _version(path: Path) -> Stamp | None:
    try:
        return file_version(path)
    except FileNotFoundError:
        return None
