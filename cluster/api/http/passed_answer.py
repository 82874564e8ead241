"""Answers that a standby passes on: they keep their id and time, and a new leader sends only what the client lacks.

A resumed answer is computed again from its first token, or read from the journal. It has the same events then, so their
number and a digest tell where to go on. What is sent during silence does not count. Samples, and prompts of one
request, come in another order among each other at each leader, so each is a part of its own, and counted by itself.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request

from cluster.api.http.json_response import new_id
from cluster.core.errors import AnswerDiffers
from cluster.core.limits import MAX_SAMPLES
from cluster.core.request import FinishEvent, TokenEvent

PASSED: Final = "macpipe.passed"
"""Key in the ASGI scope: the ``PassedAnswer`` of a request that a standby passed on."""
PART: Final = "macpipe.part"
"""Key in an ASGI message: the number of the part to which a piece of a stream belongs; 0 without it."""
SILENCE: Final = 2**32 - 1
"""The number of what is sent during silence, in place of a part's: it may look like an event of the answer."""
ERROR: Final = "macpipe.error"
"""Key in an ASGI message: the ``MacpipeError`` that a response, or the end of a stream, tells the client."""
_SILENCE: Final = (b":", b"event: ping\n")
"""Beginnings of what is sent during silence by leaders of earlier versions."""
_VARIES: Final = b"event: message_start\n"
"""The beginning of an event that tells how much of the prompt was cached, which another leader does not know."""


@dataclass(frozen=True, slots=True)
class KnownPart:
    """The first ``events`` of one part of an answer, and a digest of them."""

    events: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class PassedAnswer:
    """What a standby says of an answer. ``created`` is in seconds since 1970.

    ``resumed``: an earlier leader may have begun it; the client has ``known`` of it, by the numbers of its parts.
    """

    request_id: str
    created: float
    resumed: bool = False
    known: Mapping[int, KnownPart] = field(default_factory=dict)

    @property
    def events(self) -> int:
        """How many events the client has."""
        return sum(part.events for part in self.known.values())

    @property
    def is_begun(self) -> bool:
        """Whether the client has some of what the model said. A stream may begin earlier, while its model is loaded."""
        return any(part.events for number, part in self.known.items() if number)


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


def part_of(event: object) -> int:
    """Return the number of the part to which an event of an answer belongs, 0 if it is of the whole answer."""
    match event:
        case (int(prompt), of_prompt):
            return 1 + prompt * MAX_SAMPLES + getattr(of_prompt, "sample", 0)
        case _:
            return 1 + event.sample if isinstance(event, TokenEvent | FinishEvent) else 0


class CountedEvents:
    """Counts and compares the pieces of a stream, each of which has one or more whole events of one part."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._hashes: dict[int, Any] = {}

    def add(self, piece: bytes, part: int) -> bool:
        """Count a piece. Return whether it counts."""
        if part == SILENCE or piece.startswith(_SILENCE):
            return False
        self._counts[part] = self._counts.get(part, 0) + 1
        digest = self._hashes.setdefault(part, hashlib.sha256())
        if not piece.startswith(_VARIES):
            digest.update(piece)
        return True

    def known(self, part: int) -> KnownPart:
        """Return what there is of a part."""
        return KnownPart(self._counts.get(part, 0), self._hashes.get(part, hashlib.sha256()).digest())

    @property
    def all_known(self) -> dict[int, KnownPart]:
        """Return what there is of each part."""
        return {part: self.known(part) for part in self._counts}


class KnownEvents:
    """Leaves out the pieces of a resumed stream that its client has."""

    def __init__(self, passed: PassedAnswer) -> None:
        self._left = dict(passed.known)
        """The parts of which the client has more than has come."""
        self._found = CountedEvents()
        self.differs = False
        """Whether the answer has other events than the client."""

    @property
    def is_behind(self) -> bool:
        """Whether the client has more than has come."""
        return bool(self._left)

    def is_known(self, piece: bytes, part: int) -> bool:
        """Return whether the client has the next piece, or would have to have it: see ``differs``."""
        if self.differs:
            return True
        wanted = self._left.get(part)
        if wanted is None:
            return False
        if self._found.add(piece, part) and self._found.known(part).events == wanted.events:
            del self._left[part]
            if self._found.known(part) != wanted:
                self.differs = True
        return True

    def close(self) -> None:
        """Raise ``AnswerDiffers`` if the answer has had others or fewer than the client."""
        if self.differs or self._left:
            raise AnswerDiffers("the answer has other events than the client received; send the request again")
