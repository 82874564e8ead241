"""Keep a copy of the leader's state in the places from which this Mac's coordinator reads its own.

So a standby that takes over starts like a coordinator that restarts. While a whole copy is replaced, it is marked as
incomplete: this Mac may then lead, but resumes no answers.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from cluster.coordinator.identity import state_folder
from cluster.coordinator.replica_mark import ReplicaMark
from cluster.coordinator.replicated_service import SERVICE_FILE, ReplicatedService
from cluster.coordinator.state_files import ID_FILE, KEYS_FILE, MEMBERS_FILE, StateFiles, state_files
from cluster.core.errors import InvalidOption, StaleTerm, Unreachable
from cluster.core.term_limits import MAX_TERM
from cluster.membership.in_sync import InSyncSet
from cluster.platform.paths import hold_id
from cluster.platform.private_files import CHOOSE_FOLDER, create_private_file, not_written, replace_file, write_all
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.members import Members
from cluster.v1 import leader_pb2 as pb

__all__ = ["ReplicaFolder"]

_WHAT: Final = "the leader's state"


class ReplicaFolder:
    """The copy under ``home``. Enter it before a leader is followed, and leave it before this Mac leads.

    Raises ``InvalidOption`` on entry if a coordinator with this state folder runs already.
    """

    def __init__(self, home: Path, cluster: str) -> None:
        self._folder, self._shared = state_folder(home, cluster), ClusterFolder(home, cluster)
        self._paths = state_files(home, cluster) | {SERVICE_FILE: self._folder / SERVICE_FILE}
        self._journal_path = self._folder / "journal"
        self._mark = ReplicaMark(home, cluster)
        self._journal = self._fresh = -1
        self._held = ExitStack()

    def __enter__(self) -> ReplicaFolder:
        try:
            self._held.enter_context(hold_id(self._folder))
        except BlockingIOError:
            raise InvalidOption(
                f"a coordinator of this cluster runs already with the state folder {self._folder}; {CHOOSE_FOLDER}"
            ) from None
        except OSError as e:
            raise not_written(e, self._folder, _WHAT) from e
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._held.close()

    @property
    def id(self) -> str:
        """The id of this copy, which stays on this disk."""
        return self._mark.id

    @property
    def term(self) -> int:
        """The highest term of a leader that it was copied from."""
        return self._mark.term

    @property
    def is_complete(self) -> bool:
        """Whether it is a whole copy, from which this Mac can lead."""
        return self._mark.is_complete

    def is_in_sync(self, named: InSyncSet) -> bool:
        """Return whether it has every record whose event a client saw, by the set that the workers name."""
        return self.is_complete and self.id in named.replicas

    def service(self) -> ReplicatedService:
        """Return what the leader served. Raises ``InvalidOption`` if it cannot be read."""
        path = self._paths[SERVICE_FILE]
        try:
            return ReplicatedService.decode(path.read_bytes())
        except OSError as e:
            raise InvalidOption(f"the leader's settings cannot be read from {path}: {e.strerror}") from e

    def own_files(self) -> StateFiles:
        """Return the files of this Mac's coordinator, of which none was looked at yet."""
        return StateFiles(self._shared.home, self._shared.cluster)

    def may_edit(self, name: str) -> bool:
        """Return whether commands on this Mac edit the file with this name, so that the leader must be told."""
        return name == MEMBERS_FILE or (name == KEYS_FILE and self._shared.holds_authority)

    # While a leader is followed

    def begin(self, first: pb.FollowResponse) -> None:
        """Expect a whole copy after ``first``. Until then this one is not complete. Raises as ``apply`` does."""
        self._learn_term(first.leadership.term)
        self._mark.change(is_complete=False)
        self._close()

    def apply(self, update: pb.FollowResponse) -> None:
        """Store an update; a crash of this process does not lose it.

        Raises ``StaleTerm`` if the leader's term is older than one that was followed before, and the error of a failed
        write.
        """
        match update.WhichOneof("update"):
            case "leadership":
                self._learn_term(update.leadership.term)
            case "file":
                self._store_file(update.file)
            case "records":
                self._append(update.records)
            case "journal":
                self._store_piece(update.journal)
            case "complete":
                self._mark.change(is_complete=True)

    def sync(self) -> None:
        """Flush the journal to the disk. A power failure then loses nothing before."""
        if self._journal >= 0:
            with suppress(OSError):
                os.fsync(self._journal)

    def _learn_term(self, term: int) -> None:
        if term > MAX_TERM:
            raise Unreachable(f"the coordinator names term {term}, which cannot be")
        if 0 < term < self.term:
            raise StaleTerm(f"the coordinator leads by term {term}, but this standby has followed term {self.term}")
        if term > self.term:
            self._mark.change(is_complete=self.is_complete, term=term)

    def _store_file(self, file: pb.ReplicatedFile) -> None:
        path = self._paths.get(file.name)
        if path is None or (file.name == KEYS_FILE and self._shared.holds_authority):
            return  # of a newer version; or edited on this Mac alone, which holds the authority
        if file.name == MEMBERS_FILE:
            if self._shared.exists and not file.missing:
                Members(self._shared).merge(file.content)
            return
        try:
            if file.name == ID_FILE:
                _write_in_place(path, file.content)
            elif file.missing:
                path.unlink(missing_ok=True)
            else:
                replace_file(path, file.content)
        except OSError as e:
            raise not_written(e, path, _WHAT) from e

    def _append(self, records: bytes) -> None:
        try:
            write_all(self._journal, records)
        except OSError as e:
            raise not_written(e, self._journal_path, "the leader's journal") from e

    def _store_piece(self, piece: pb.JournalPiece) -> None:
        path = self._journal_path.with_suffix(".copy")
        try:
            if piece.first:
                self._close_fresh()
                self._fresh = create_private_file(path)
            write_all(self._fresh, piece.content)
            if not piece.last:
                return
            os.fsync(self._fresh)
            path.replace(self._journal_path)
        except OSError as e:
            raise not_written(e, path, "the leader's journal") from e
        fresh, self._fresh = self._fresh, -1
        self._close()
        self._journal = fresh

    def _close(self) -> None:
        self._close_fresh()
        if self._journal >= 0:
            os.close(self._journal)
        self._journal = -1

    def _close_fresh(self) -> None:
        if self._fresh >= 0:
            os.close(self._fresh)
        self._fresh = -1


def _write_in_place(path: Path, content: bytes) -> None:
    """Write the id into its file, which this process holds, unless it is there already."""
    if path.read_bytes() != content:
        file = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            write_all(file, content)
            os.fsync(file)
        finally:
            os.close(file)
