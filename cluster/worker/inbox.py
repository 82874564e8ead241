"""The inbox: frames that have arrived at a stage and wait for their turn, put together from their messages.

Any thread may put messages; the MLX thread takes frames. The inbox has one epoch and drops frames of any other.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame
from cluster.core.limits import MAX_BODIES_WAITING, MAX_WAITING_BYTES
from cluster.scheduler.frame_order import FrameOrder
from cluster.scheduler.reordering import ReorderBuffer
from cluster.wire.frame_codec import with_body
from cluster.wire.message_split import FrameBody, FrameHead, unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A complete frame and when it became complete, in nanoseconds of ``time.perf_counter_ns``.

    ``more``: other frames wait behind it, so a job must be posted that takes the next one.
    """

    frame: Frame
    at_ns: int
    more: bool


class Inbox:
    """The waiting frames of one epoch. ``in_order``: none overtakes another, as a group's ranks need it."""

    def __init__(self, epoch: int, *, in_order: bool = False) -> None:
        self._epoch = epoch
        self._lock = threading.Lock()
        self._turns: FrameOrder | ReorderBuffer = FrameOrder() if in_order else ReorderBuffer()
        self._arrived: dict[int, int] = {}
        self._bodies: dict[int, FrameBody] = {}
        """Bodies that arrived before their heads."""
        self._bytes = 0
        """Waiting bytes of all frames."""
        self._sizes: dict[int, int] = {}
        """Waiting bytes by frame number."""
        self._job_posted = False
        """Whether a job that takes frames is on its way."""

    def put(self, message: bytes) -> bool:
        """Add a message. Returns True if a job must be posted that takes frames. Raises ``BadFrame``."""
        parcel = unpack(message)
        epoch = parcel.frame.epoch if isinstance(parcel, FrameHead) else parcel.epoch
        if epoch != self._epoch:
            log.warning("inbox: frame of another epoch dropped epoch=%d loaded=%d", epoch, self._epoch)
            return False
        with self._lock:
            number = parcel.frame.number if isinstance(parcel, FrameHead) else parcel.number
            self._require_room(number, len(message))
            if isinstance(parcel, FrameHead):
                self._put_head(parcel)
            else:
                self._put_body(parcel)
            needs_job = not self._job_posted
            self._job_posted = True
            return needs_job

    def _require_room(self, number: int, size: int) -> None:
        """Count a message's bytes; ``take`` releases them. Raises ``BadFrame`` if too many bytes wait."""
        if self._bytes and self._bytes + size > MAX_WAITING_BYTES:
            raise BadFrame(
                f"the stage's inbox is full: {self._bytes} of {MAX_WAITING_BYTES} bytes wait, and {size} more arrived"
            )
        self._bytes += size
        self._sizes[number] = self._sizes.get(number, 0) + size

    def _put_head(self, head: FrameHead) -> None:
        number = head.frame.number
        if number in self._arrived:
            raise BadFrame(f"two waiting frames have the number {number}")
        body = None if head.whole else self._bodies.pop(number, None)
        frame = with_body(head.frame, body.data) if body else head.frame
        self._turns.add(frame, ready=head.whole or body is not None)
        self._arrived[number] = time.perf_counter_ns()

    def _put_body(self, body: FrameBody) -> None:
        frame = self._turns.waiting_without_tensors(body.number)
        if frame is not None:
            self._turns.complete(with_body(frame, body.data))
            self._arrived[body.number] = time.perf_counter_ns()
        elif len(self._bodies) >= MAX_BODIES_WAITING:
            raise BadFrame(f"{len(self._bodies)} frame bodies arrived without their heads")
        else:
            self._bodies[body.number] = body

    def take(self) -> Arrival | None:
        """Take the frame whose turn it is; None if none can run yet.

        If no other frame waits behind it, the next message needs a job of its own.
        """
        with self._lock:
            frame = self._turns.take()
            self._job_posted = frame is not None and len(self._turns) > 0
            if frame is None:
                return None
            self._bytes -= self._sizes.pop(frame.number, 0)
            return Arrival(frame, self._arrived.pop(frame.number), self._job_posted)
