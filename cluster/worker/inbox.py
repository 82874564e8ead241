"""The inbox: frames that have arrived at a stage and wait for their turn, made whole from what travels.

Any thread may put messages in; the MLX thread takes frames out. It knows one epoch; frames of another are dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame
from cluster.core.limits import MAX_BODIES_WAITING, MAX_WAITING_BYTES
from cluster.scheduler.reordering import ReorderBuffer
from cluster.wire.frame_codec import with_body
from cluster.wire.message_split import FrameBody, FrameHead, unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A whole frame and when it was whole, in the nanoseconds of ``time.perf_counter_ns``.

    Where there are ``more`` behind it, a job has to be posted that takes the next one.
    """

    frame: Frame
    at_ns: int
    more: bool


class Inbox:
    """Frames of one epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._lock = threading.Lock()
        self._turns = ReorderBuffer()
        self._arrived: dict[int, int] = {}
        self._bodies: dict[int, FrameBody] = {}
        """Those that came before their heads."""
        self._bytes = 0
        self._sizes: dict[int, int] = {}
        """Bytes that wait, in all and of each frame."""
        self._watched = False
        """A job that takes frames out is on its way."""

    def put(self, message: bytes) -> bool:
        """A message arrived; True where a job has to be posted that takes frames out. Raises ``BadFrame``."""
        parcel = unpack(message)
        epoch = parcel.frame.epoch if isinstance(parcel, FrameHead) else parcel.epoch
        if epoch != self._epoch:
            log.warning("dropped a frame of epoch %d: epoch %d is loaded", epoch, self._epoch)
            return False
        with self._lock:
            number = parcel.frame.number if isinstance(parcel, FrameHead) else parcel.number
            self._require_room(number, len(message))
            if isinstance(parcel, FrameHead):
                self._put_head(parcel)
            else:
                self._put_body(parcel)
            watched, self._watched = self._watched, True
            return not watched

    def _require_room(self, number: int, size: int) -> None:
        """Count a message in; ``take`` counts its frame out. Raises ``BadFrame`` where too many bytes wait."""
        if self._bytes and self._bytes + size > MAX_WAITING_BYTES:
            raise BadFrame(f"frames of {self._bytes} bytes wait on one stage")
        self._bytes += size
        self._sizes[number] = self._sizes.get(number, 0) + size

    def _put_head(self, head: FrameHead) -> None:
        number = head.frame.number
        if number in self._arrived:
            raise BadFrame(f"two frames that wait on one stage have the number {number}")
        body = None if head.whole else self._bodies.pop(number, None)
        frame = with_body(head.frame, body.data) if body else head.frame
        self._turns.add(frame, ready=head.whole or body is not None)
        self._arrived[number] = time.perf_counter_ns()

    def _put_body(self, body: FrameBody) -> None:
        frame = self._turns.lacking(body.number)
        if frame is not None:
            self._turns.complete(with_body(frame, body.data))
            self._arrived[body.number] = time.perf_counter_ns()
        elif len(self._bodies) >= MAX_BODIES_WAITING:
            raise BadFrame(f"{len(self._bodies)} bodies came whose frames did not")
        else:
            self._bodies[body.number] = body

    def take(self) -> Arrival | None:
        """The frame whose turn it is; None where none can run yet. Where none waits behind it either, the next message
        needs a job of its own.
        """
        with self._lock:
            frame = self._turns.take()
            self._watched = frame is not None and len(self._turns) > 0
            if frame is None:
                return None
            self._bytes -= self._sizes.pop(frame.number, 0)
            return Arrival(frame, self._arrived.pop(frame.number), self._watched)
