"""The slot: the one stage an engine may hold, where its frames come from and where they go.

``received`` and ``outbox`` are called on the data port's threads and only unpack and pass on; all else runs on the MLX
thread, jobs in the engine's order and frames as their turn comes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.core.errors import BadFrame, LinkFailed, MacpipeError, ModelDiffers, StageFailed, StaleEpoch, Unreachable
from cluster.core.frames import Failure, Frame, StageTiming
from cluster.core.plan import ModelRef, StageSpec
from cluster.model import device
from cluster.model.checkpoint import resolve_model
from cluster.model.stage import Stage, load_stage
from cluster.model.warmup import warm
from cluster.security.trust import WORKER
from cluster.transport.streams import Dialer, Line, Outbox, Subscription
from cluster.wire.message_split import Parcel, pack
from cluster.worker.inbox import Arrival, Inbox
from cluster.worker.throttle import Throttle

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Ports:
    """Where one epoch's frames wait, coming and going."""

    inbox: Inbox
    urgent: Outbox
    bulk: Outbox

    @staticmethod
    def of(epoch: int) -> _Ports:
        return _Ports(Inbox(epoch), Outbox(epoch), Outbox(epoch))

    def send(self, parcel: Parcel) -> None:
        (self.bulk if parcel.bulk else self.urgent).send(parcel.message)

    def close(self) -> None:
        self.urgent.close()
        self.bulk.close()


class StageHost:
    """Empty, or one loaded stage. ``post`` hands a job to the MLX thread."""

    def __init__(
        self, post: Callable[[Callable[[], None]], None], dialer: Dialer, throttle: Throttle | None = None
    ) -> None:
        self._post = post
        self._throttle = throttle or Throttle()
        self._dialer = dialer
        self._stage: Stage | None = None
        self._ports: _Ports | None = None
        self._inlets: list[Subscription] = []
        self._index = 0
        self._pack_us = 0

    @property
    def epoch(self) -> int:
        """The loaded stage's epoch; 0 where nothing is loaded."""
        return self._ports.urgent.epoch if self._ports else 0

    @property
    def sequences(self) -> int:
        return self._stage.sequences if self._stage else 0

    def load(self, spec: StageSpec, progress: Callable[[int, int], None]) -> None:
        """Hold this slice: where it is held already, for another epoch, no weight is read; else it replaces what is.

        Raises what ``load_stage`` raises, and ``StaleEpoch`` for an epoch that is over.
        """
        if spec.epoch < self.epoch:
            why = f"asked to load epoch {spec.epoch}, but epoch {self.epoch} is loaded"
            raise StaleEpoch(why, epoch=str(self.epoch))
        self._unlink()
        if not self._try_begin_epoch(spec, progress):
            self.unload()
            stage = load_stage(spec, _folder(spec.model), progress)
            if device.compiles():
                warm(stage)
            self._stage = stage
        self._index, self._ports = spec.index, _Ports.of(spec.epoch)

    def _try_begin_epoch(self, spec: StageSpec, progress: Callable[[int, int], None]) -> bool:
        """Have the stage that is held serve ``spec``; False where it cannot."""
        if self._stage is None:
            return False
        try:
            self._stage.begin_epoch(spec)
        except StaleEpoch:
            return False
        progress(self._stage.weight_bytes, self._stage.weight_bytes)
        return True

    def link(self, epoch: int, pull_from: str, peer: str = WORKER) -> None:
        """Take frames from the stage before, which ``peer`` holds.

        Raises ``StaleEpoch``, and ``LinkFailed`` where that is out of reach.
        """
        if epoch != self.epoch:
            why = f"asked to link epoch {epoch}, but epoch {self.epoch} is loaded"
            raise StaleEpoch(why, epoch=str(self.epoch))
        if not pull_from:
            return
        self._close_inlets()
        try:
            for line in Line:
                lost = partial(self._on_inlet_lost, epoch)
                self._inlets.append(self._dialer.pull(pull_from, epoch, self.received, lost, line, peer))
        except (Unreachable, StaleEpoch) as e:
            self._close_inlets()
            raise LinkFailed(e.sentence) from e

    def _close_inlets(self) -> None:
        for inlet in self._inlets:
            inlet.close()
        self._inlets.clear()

    def unload(self) -> None:
        """Free the stage, its caches and its streams; nothing happens where the slot is empty."""
        self._unlink()
        if self._stage:
            self._stage.close()
        self._stage = None
        device.release()

    def _unlink(self) -> None:
        """End the epoch's streams; the stage stays as it is."""
        self._close_inlets()
        if self._ports:
            self._ports.close()
        self._ports = None

    def outbox(self, epoch: int, line: Line) -> Outbox | None:
        ports = self._ports
        if ports is None or ports.urgent.epoch != epoch:
            return None
        return ports.bulk if line is Line.BULK else ports.urgent

    def received(self, message: bytes) -> None:
        ports = self._ports
        if ports is None:
            log.warning("dropped a frame: nothing is loaded")
            return
        try:
            needs_job = ports.inbox.put(message)
        except BadFrame as e:
            log.warning("broke the ring off: %s", e.sentence)
            ports.close()  # a frame is missing from the log now, so nothing after it can be right
            return
        if needs_job:
            self._post(lambda: self._work(ports))

    def _on_inlet_lost(self, epoch: int, why: str) -> None:
        """Pass the loss on: whoever pulls from this stage sees its streams end too, up to the coordinator."""
        log.warning("%s", why)
        ports = self._ports
        if ports and ports.urgent.epoch == epoch:
            ports.close()

    def _work(self, ports: _Ports) -> None:
        """Run the frame whose turn has come, one a job: a command waits for one frame, not until none is left."""
        if self._stage and self._ports is ports and (arrival := ports.inbox.take()):
            self._advance(self._stage, ports, arrival)
            if arrival.more:
                self._post(lambda: self._work(ports))

    def _advance(self, stage: Stage, ports: _Ports, arrival: Arrival) -> None:
        """One frame: apply, compute, send on with this stage's timing."""
        started, frame = time.perf_counter_ns(), arrival.frame
        result = _run_step(stage, self._index, frame)
        self._throttle.stretch((time.perf_counter_ns() - started) / 1e9)
        computed = time.perf_counter_ns()
        waited, took = (started - arrival.at_ns) // 1000, (computed - started) // 1000
        timing = StageTiming(self._index, waited, took, self._pack_us)
        for parcel in pack(replace(result, timings=(*frame.timings, timing))):
            ports.send(parcel)
        self._pack_us = (time.perf_counter_ns() - computed) // 1000


def _run_step(stage: Stage, index: int, frame: Frame) -> Frame:
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
