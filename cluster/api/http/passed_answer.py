"""Answers that a standby passes on: they keep their id and time, and a new leader sends only what the client lacks.

A resumed answer is computed again from its first token, or read from the journal. It has the same events then, so their
number and a digest tell where to go on. What is sent during silence does not count.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from cluster.api.http.json_response import new_id
from cluster.core.errors import AnswerDiffers

PASSED: Final = "macpipe.passed"
"""Key in the ASGI scope: the ``PassedAnswer`` of a request that a standby passed on."""
_SILENCE: Final = (b":", b"event: ping\n")
"""Beginnings of what is sent during silence."""
_VARIES: Final = b"event: message_start\n"
"""The beginning of an event that tells how much of the prompt was cached, which another leader does not know."""


@dataclass(frozen=True, slots=True)
class PassedAnswer:
    """What a standby says of an answer. ``created`` is in seconds since 1970.

    ``resumed``: an earlier leader may have begun it; the client has its first ``events``, with this ``digest``.
    """

    request_id: str
    created: float
    resumed: bool = False
    events: int = 0
    digest: bytes = b""


def passed_answer(request: Request) -> PassedAnswer | None:
    """Return what a standby says of the answer to a request; None if the client sent it here."""
    passed: PassedAnswer | None = request.scope.get(PASSED)
    return passed


def answer_id(request: Request, prefix: str) -> str:
    """Return the id of the answer to a request."""
    passed = passed_answer(request)
    return f"{prefix}{passed.request_id}" if passed else new_id(prefix)


def answer_time(request: Request) -> float:
    """Return when the answer to a request was begun, in seconds since 1970."""
    passed = passed_answer(request)
    return passed.created if passed else time.time()


class CountedEvents:
    """Counts and compares the pieces of a stream, each of which has one or more whole events."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.sha256()

    def add(self, piece: bytes) -> bool:
        """Count a piece. Return whether it counts."""
        if piece.startswith(_SILENCE):
            return False
        self.count += 1
        if not piece.startswith(_VARIES):
            self._hash.update(piece)
        return True

    def digest(self) -> bytes:
        """Return the digest of the pieces so far."""
        return self._hash.digest()


class KnownEvents:
    """Leaves out the pieces of a resumed stream that its client has."""

    def __init__(self, passed: PassedAnswer) -> None:
        self._passed = passed
        self._found = CountedEvents()
        self._differs = False

    def is_known(self, piece: bytes) -> bool:
        """Return whether the client has the next piece. Raises ``AnswerDiffers`` if it has others."""
        passed, found = self._passed, self._found
        if found.count >= passed.events:
            return False
        if found.add(piece) and found.count == passed.events and found.digest() != passed.digest:
            self._differs = True
            self.close()
        return True

    def close(self) -> None:
        """Raise ``AnswerDiffers`` if the answer has had others or fewer than the client."""
        if self._differs or self._found.count < self._passed.events:
            raise AnswerDiffers("the answer has other events than the client received; send the request again")
