"""Terms, and the calls by which a coordinator asks workers for them.

A worker belongs to one term at a time. It grants a number once only, to one process of a coordinator, so at one worker
the number alone names the leader. This module knows values; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cluster.membership.in_sync import NOT_NAMED, InSyncSet

__all__ = ["NO_TERM", "Denial", "Process", "Term", "TermAnswer", "TermCall", "TermRequest"]


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """A running coordinator: its id, which survives restarts, and a random id of this process."""

    leader: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """A number, and the process that leads by it. Terms are ordered by their numbers first."""

    number: int
    process: Process


NO_TERM: Final = Term(0, Process())
"""The term of a worker that never granted one."""


class TermRequest(StrEnum):
    """What a coordinator wants of a worker: ``ASK`` changes nothing, ``GRANT`` takes the worker, ``RENEW`` keeps it."""

    ASK = "ask"
    GRANT = "grant"
    RENEW = "renew"
    RETURN = "return"


class Denial(StrEnum):
    """Why a worker does not grant or renew a term."""

    OLD = "old"
    """The number is not higher than the one that the worker granted."""
    LEASED = "leased"
    """The lease of another process has not ended."""
    BUSY = "busy"
    """Another grant is being written."""
    NOT_WRITTEN = "not written"
    """The worker cannot write to its disk."""


@dataclass(frozen=True, slots=True)
class TermCall:
    """A call to a worker. ``sent_at`` is in seconds of the caller's clock. The number of an ``ASK`` does not matter."""

    request: TermRequest
    worker: str
    term: Term
    sent_at: float


@dataclass(frozen=True, slots=True)
class TermAnswer:
    """A worker's answer to ``call``: None as ``denial`` if it did what was asked, and the term that it has granted.

    ``in_sync`` is the set that it was told last, in any term; ``newest_epoch`` is the largest number of an epoch that
    it was asked to load.
    """

    call: TermCall
    denial: Denial | None
    granted: Term
    in_sync: InSyncSet = NOT_NAMED
    newest_epoch: int = 0
