"""The term that a worker has granted, on its disk: a number that must never go back, and whose it is.

Beside it, which copies of the leader's state were in sync when the worker was told last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.core.errors import InvalidOption
from cluster.core.replication_limits import MAX_COPIES
from cluster.core.term_limits import MAX_TERM
from cluster.membership.in_sync import NOT_NAMED, InSyncSet
from cluster.membership.terms import Process, Term
from cluster.platform.json_file import read_json, write_json
from cluster.platform.private_files import not_written
from cluster.worker.settings import worker_folder

__all__ = ["MAX_ID_CHARS", "TermFile", "term_file"]

_MAX_BYTES = 4096
MAX_ID_CHARS = 64


class TermFile:
    """The file ``path``. It is replaced atomically and synced."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[Term | None, InSyncSet]:
        """Return the term, None if none was ever granted, and the set that a leader named last.

        Raises ``InvalidOption`` if the file is damaged: without its number, a coordinator of an earlier term could
        come back.
        """
        try:
            return _decode(read_json(self._path, _MAX_BYTES))
        except FileNotFoundError:
            return None, NOT_NAMED
        except (OSError, ValueError) as e:
            raise InvalidOption(
                f"cannot read {self._path} ({e}), which says whose worker this is; if no coordinator uses this worker, "
                "delete the file"
            ) from e

    def write(self, term: Term, in_sync: InSyncSet = NOT_NAMED) -> None:
        """Store a term and a set. Raises ``DiskFull`` or ``InvalidOption``; the old content is then still there."""
        named = [] if in_sync == NOT_NAMED else [[in_sync.term, in_sync.version, list(in_sync.replicas)]]
        try:
            write_json(self._path, [term.number, term.process.leader, term.process.instance, *named])
        except OSError as e:
            raise not_written(e, self._path, "the coordinator's term") from e


def _decode(content: Any) -> tuple[Term, InSyncSet]:
    match content:
        case [int(number), str(leader), str(instance), *named] if (
            type(number) is int and 0 < number <= MAX_TERM and max(len(leader), len(instance)) <= MAX_ID_CHARS
        ):
            return Term(number, Process(leader, instance)), _decode_set(named)
    raise ValueError("it is damaged")


def _decode_set(named: list[Any]) -> InSyncSet:
    match named:
        case []:
            return NOT_NAMED
        case [[int(term), int(version), [*replicas]]] if (
            0 < term <= MAX_TERM and version > 0 and len(replicas) <= MAX_COPIES and all(map(_is_id, replicas))
        ):
            return InSyncSet(int(term), int(version), tuple(replicas))
    raise ValueError("it is damaged")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS


def term_file(home: Path, worker: str) -> TermFile:
    """Return the file of the worker with this name."""
    return TermFile(worker_folder(home, worker) / "term")
