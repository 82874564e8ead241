"""The slot: the one stage an engine may hold, where its frames come from and where they go.

``received`` and ``outbox`` are called on the data port's threads and only pass bytes on; all else runs on the MLX
thread, in the order of the engine's jobs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.errors import BadFrame, LinkFailed, MacpipeError, ModelDiffers, StageFailed, StaleEpoch, Unreachable
from cluster.frames import Failure, Frame
from cluster.model import device
from cluster.model.checkpoint import resolve_model
from cluster.model.stage import Stage, load_stage
from cluster.transport.rings import GrpcDialer
from cluster.transport.streams import Dialer, Outbox, Subscription
from cluster.types import ModelRef, StageSpec, StageTiming
from cluster.wire.frame import decode, encode

log = logging.getLogger(__name__)


class Slot:
    """Empty, or one loaded stage. ``post`` hands a job to the MLX thread."""

    def __init__(self, post: Callable[[Callable[[], None]], None], dialer: Dialer | None = None) -> None:
        self._post = post
        self._dialer = dialer or GrpcDialer()
        self._stage: Stage | None = None
        self._outbox: Outbox | None = None
        self._inlet: Subscription | None = None
        self._index = 0
        self._pack_us = 0

    @property
    def epoch(self) -> int:
        """The loaded stage's epoch; 0 where nothing is loaded."""
        return self._outbox.epoch if self._outbox else 0

    @property
    def sequences(self) -> int:
        return self._stage.sequences if self._stage else 0

    def load(self, spec: StageSpec, progress: Callable[[int, int], None]) -> None:
        """Drop what is held and hold this slice. Raises what ``load_stage`` raises."""
        self.unload()
        stage = load_stage(spec, _folder(spec.model), progress)
        self._stage, self._index, self._outbox = stage, spec.index, Outbox(spec.epoch)

    def link(self, epoch: int, pull_from: str) -> None:
        """Take frames from the stage before. Raises ``StaleEpoch``, and ``LinkFailed`` where that is out of reach."""
        if epoch != self.epoch:
            raise StaleEpoch(f"asked to link epoch {epoch}, but epoch {self.epoch} is loaded")
        if not pull_from:
            return
        if self._inlet:
            self._inlet.close()
        try:
            self._inlet = self._dialer.pull(pull_from, epoch, self.received, partial(self._lost_inlet, epoch))
        except (Unreachable, StaleEpoch) as e:
            raise LinkFailed(e.sentence) from e

    def unload(self) -> None:
        """Free the stage, its caches and its streams; nothing happens where the slot is empty."""
        if self._inlet:
            self._inlet.close()
        if self._outbox:
            self._outbox.close()
        if self._stage:
            self._stage.close()
        self._stage = self._outbox = self._inlet = None
        device.release()

    def outbox(self, epoch: int) -> Outbox | None:
        outbox = self._outbox
        return outbox if outbox and outbox.epoch == epoch else None

    def received(self, message: bytes) -> None:
        arrived = time.perf_counter_ns()
        self._post(lambda: self._advance(message, arrived))

    def _lost_inlet(self, epoch: int, why: str) -> None:
        """Pass the loss on: whoever pulls from this stage sees its stream end too, up to the coordinator."""
        log.warning("%s", why)
        if outbox := self.outbox(epoch):
            outbox.close()

    def _advance(self, message: bytes, arrived: int) -> None:
        """One frame: decode, apply, compute, send on with this stage's timing."""
        started = time.perf_counter_ns()
        try:
            frame = decode(message)
        except BadFrame as e:
            log.warning("broke the ring off: %s", e.sentence)
            if self._outbox:
                self._outbox.close()  # a frame is missing from the log now, so nothing after it can be right
            return
        if self._stage is None or self._outbox is None or frame.epoch != self.epoch:
            log.warning("dropped a frame of epoch %d: epoch %d is loaded", frame.epoch, self.epoch)
            return
        result = _stepped(self._stage, self._index, frame)
        computed = time.perf_counter_ns()
        timing = StageTiming(self._index, (started - arrived) // 1000, (computed - started) // 1000, self._pack_us)
        self._outbox.send(encode(replace(result, timings=(*frame.timings, timing))))
        self._pack_us = (time.perf_counter_ns() - computed) // 1000


def _stepped(stage: Stage, index: int, frame: Frame) -> Frame:
    """The stage's answer; a step that fails goes on as an error, so that no later stage waits for it."""
    try:
        return stage.step(frame)
    except Exception as e:  # whatever a forward raises must end one request, not the engine
        if not isinstance(e, MacpipeError):
            log.exception("frame %d of lane %d failed", frame.number, frame.lane)
        reason, sentence = sentence_of(e)
        return replace(frame, tensors=(), error=Failure(index, reason, sentence))


def sentence_of(error: Exception) -> tuple[str, str]:
    """The error's reason and sentence; an unexpected one counts as a failed stage."""
    if isinstance(error, MacpipeError):
        return error.reason, error.sentence
    return StageFailed.reason, f"{type(error).__name__}: {error}"


def _folder(model: ModelRef) -> Path:
    """Where this machine has the model: the same folder as the coordinator, or what the name means here."""
    if Path(model.path).is_dir():
        return Path(model.path)
    try:
        return resolve_model(model.name)
    except MacpipeError as e:
        raise ModelDiffers(
            f"this worker has no copy of {model.name}: neither the folder {model.path} nor a model of that name is "
            "here; copy the folder to the same place"
        ) from e
