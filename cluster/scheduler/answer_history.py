"""Keeps the answers that each client got lately, so that its next ones can be guessed from them.

An answer serves its own client alone: what another client was told must not show, not even in how fast an answer is.
Answers are dropped by age, by bytes, and when their client is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.core.limits import ANSWER_AGE_S, CLIENT_ANSWER_BYTES, EARLIER_ANSWER_BYTES, MAX_ANSWER_CLIENTS
from cluster.scheduler.suffix_lookup import ID_BYTES, Packed, pack_ids

BOUNDARY: Final = pack_ids([2**32 - 1])
"""Stands after each answer. No vocabulary has this id."""
_LONGEST: Final = CLIENT_ANSWER_BYTES // 2 // ID_BYTES - 1
"""Tokens of an answer that are kept; of a longer one, the last."""


@dataclass(slots=True)
class _Answers:
    """The answers of one client, oldest first: the ``text`` of all, and of each its time and the byte after it."""

    text: bytearray = field(default_factory=bytearray)
    ends: deque[tuple[float, int]] = field(default_factory=deque)


class AnswerHistory:
    """The answers of all clients. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._clients: OrderedDict[str, _Answers] = OrderedDict()
        """By the time of their last answer, oldest first."""
        self._bytes = 0

    @property
    def size(self) -> int:
        """Return the bytes of all answers."""
        return self._bytes

    def add(self, client: str, answer: Sequence[int]) -> None:
        """Keep an answer. Drop old ones, and if there are too many, those of whoever got none for longest."""
        self._drop_silent_clients()
        if not answer:
            return
        packed = pack_ids(answer[-_LONGEST:]) + BOUNDARY
        own = self._clients.setdefault(client, _Answers())
        self._clients.move_to_end(client)
        if len(own.text) + len(packed) > CLIENT_ANSWER_BYTES:
            self._shrink(own, CLIENT_ANSWER_BYTES // 2)  # by half, so that few answers cause a copy
        own.text += packed
        own.ends.append((self._clock(), len(own.text)))
        self._bytes += len(packed)
        while self._bytes > EARLIER_ANSWER_BYTES or len(self._clients) > MAX_ANSWER_CLIENTS:
            self.forget(next(iter(self._clients)))

    def of(self, client: str) -> Packed:
        """Return the client's answers, packed, each followed by ``BOUNDARY``. What was returned before stays valid."""
        own = self._clients.get(client)
        if own is None:
            return b""
        oldest = self._oldest()
        if own.ends[0][0] < oldest:
            dropped = max(end for at, end in own.ends if at < oldest)
            self._shrink(own, len(own.text) - dropped)
        if not own.ends:
            del self._clients[client]
        return own.text

    def forget(self, client: str) -> None:
        """Drop all answers of a client."""
        own = self._clients.pop(client, None)
        if own:
            self._bytes -= len(own.text)

    def _oldest(self) -> float:
        return self._clock() - ANSWER_AGE_S

    def _drop_silent_clients(self) -> None:
        """Drop the clients whose last answer is too old."""
        while self._clients and next(iter(self._clients.values())).ends[-1][0] < self._oldest():
            self.forget(next(iter(self._clients)))

    def _shrink(self, own: _Answers, left: int) -> None:
        """Drop the oldest answers of a client until at most ``left`` bytes are left."""
        dropped = 0
        while own.ends and len(own.text) - dropped > left:
            dropped = own.ends.popleft()[1]
        self._bytes -= dropped
        own.text = own.text[dropped:]  # a new object: a reader of the old one may go on
        own.ends = deque((at, end - dropped) for at, end in own.ends)
