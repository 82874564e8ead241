"""Mark a copy of a leader's state on this Mac's disk: its id, and whether it is whole.

The leader's own state is a copy, too. The id stays when the copy is replaced, and is sent to no other Mac.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from cluster.coordinator.identity import state_folder
from cluster.core.errors import MacpipeError
from cluster.core.term_limits import MAX_TERM
from cluster.platform.json_file import read_json, write_json
from cluster.platform.private_files import not_written

__all__ = ["ReplicaMark"]

log = logging.getLogger(__name__)

_MAX_BYTES = 1024
_ID_BYTES = 8


class ReplicaMark:
    """The mark of this Mac's copy of a cluster's state, which is made if there is none.

    ``term`` is the highest term of a leader that it was copied from. A new id that cannot be stored is valid for this
    process only, as a coordinator on a full disk serves nevertheless.
    """

    def __init__(self, home: Path, cluster: str) -> None:
        self._path = state_folder(home, cluster) / "replica"
        self.id, self.term, self.is_complete = secrets.token_hex(_ID_BYTES), 0, False
        try:
            content = read_json(self._path, _MAX_BYTES)
        except (OSError, ValueError):
            content = None
        match content:
            case [str(known), int(term), bool(is_complete)] if len(known) == 2 * _ID_BYTES and 0 <= term <= MAX_TERM:
                self.id, self.term, self.is_complete = known, int(term), is_complete
            case _:
                self._write_new()

    def change(self, *, is_complete: bool, term: int | None = None) -> None:
        """Store the mark, synced. Raises the error of a file that cannot be written."""
        changed = is_complete, self.term if term is None else term
        if changed != (self.is_complete, self.term):
            self.is_complete, self.term = changed
            self._write()

    def own(self) -> None:
        """Note that this Mac leads, so that its copy is the whole state."""
        try:
            self.change(is_complete=True)
        except MacpipeError as e:
            log.warning("replica: not marked, it resumes no answers after a restart as a standby reason=%s", e)

    def _write_new(self) -> None:
        try:
            self._write()
        except MacpipeError as e:
            log.warning("replica: id is valid for this process only reason=%s", e)

    def _write(self) -> None:
        try:
            write_json(self._path, [self.id, self.term, self.is_complete])
        except OSError as e:
            raise not_written(e, self._path, "the mark of the replica") from e
