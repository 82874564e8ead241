"""The term that a worker has granted, on its disk: a number that must never go back, and whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.core.errors import InvalidOption
from cluster.core.term_limits import MAX_TERM
from cluster.membership.terms import Process, Term
from cluster.platform.json_file import read_json, write_json
from cluster.platform.private_files import not_written
from cluster.worker.settings import worker_folder

__all__ = ["MAX_ID_CHARS", "TermFile", "term_file"]

_MAX_BYTES = 1024
MAX_ID_CHARS = 64


class TermFile:
    """The file ``path``. It is replaced atomically and synced."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Term | None:
        """Return the term; None if none was ever granted.

        Raises ``InvalidOption`` if the file is damaged: without its number, a coordinator of an earlier term could
        come back.
        """
        try:
            return _decode(read_json(self._path, _MAX_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise InvalidOption(
                f"cannot read {self._path} ({e}), which says whose worker this is; if no coordinator uses this worker, "
                "delete the file"
            ) from e

    def write(self, term: Term) -> None:
        """Store a term. Raises ``DiskFull`` or ``InvalidOption``; the old term is then still there."""
        try:
            write_json(self._path, [term.number, term.process.leader, term.process.instance])
        except OSError as e:
            raise not_written(e, self._path, "the coordinator's term") from e


def _decode(content: Any) -> Term:
    match content:
        case [int(number), str(leader), str(instance)] if (
            type(number) is int and 0 < number <= MAX_TERM and max(len(leader), len(instance)) <= MAX_ID_CHARS
        ):
            return Term(number, Process(leader, instance))
    raise ValueError("it is damaged")


def term_file(home: Path, worker: str) -> TermFile:
    """Return the file of the worker with this name."""
    return TermFile(worker_folder(home, worker) / "term")
