"""The stage host: the one stage that an engine may hold, and the streams of its frames.

``received`` and ``outbox`` run on the data port's threads and only unpack and pass on. Everything else runs on the MLX
thread: jobs in the engine's order, and frames in the order of their numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.core.adapter import AdapterRef
from cluster.core.errors import (
    BadFrame,
    LinkFailed,
    MacpipeError,
    ModelDiffers,
    PrefixMissing,
    RankFailed,
    Reason,
    StageFailed,
    StaleEpoch,
    Unreachable,
)
from cluster.core.frames import Failure, Frame, StageTiming
from cluster.core.plan import ModelRef, StageSpec
from cluster.core.training_frames import Task, TrainingCommand, TrainingReply
from cluster.model import device
from cluster.model.checkpoint import resolve_model
from cluster.model.sharding import Group
from cluster.model.stage import Stage, load_stage
from cluster.model.training_commands import TrainingCommands
from cluster.model.warmup import warm
from cluster.security.trust import WORKER
from cluster.transport.streams import Dialer, Line, Outbox, Subscription
from cluster.wire.message_split import Parcel, pack
from cluster.wire.training_codec import decode_command, encode_reply, is_training
from cluster.worker.command_inbox import CommandInbox
from cluster.worker.inbox import Arrival, Inbox
from cluster.worker.prefix_disk import PrefixDisk

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Throttle:
    """Slows a worker down for tests: steps take ``factor`` times as long; 1 changes nothing."""

    factor: float = 1.0

    def stretch(self, seconds: float) -> None:
        """Sleep after a step that took ``seconds``."""
        if self.factor > 1.0:
            time.sleep(seconds * (self.factor - 1.0))


@dataclass(frozen=True, slots=True)
class _Ports:
    """The queues of one epoch's frames, incoming and outgoing, and the term that the epoch belongs to.

    Each reader of the stage has queues of its own. All get the same messages, which are not copied.
    """

    epoch: int
    inbox: Inbox
    urgent: tuple[Outbox, ...]
    bulk: tuple[Outbox, ...]
    commands: CommandInbox
    term: int

    @staticmethod
    def of(spec: StageSpec, term: int) -> _Ports:
        epoch = spec.epoch
        urgent, bulk = (tuple(Outbox(epoch) for _ in range(spec.readers)) for _ in Line)
        return _Ports(epoch, Inbox(epoch, in_order=spec.ranks > 1), urgent, bulk, CommandInbox(), term)

    def send(self, parcel: Parcel) -> None:
        for outbox in self.bulk if parcel.bulk else self.urgent:
            outbox.send(parcel.message)

    def close(self) -> None:
        for outbox in (*self.urgent, *self.bulk):
            outbox.close()


class StageHost:
    """Holds no stage or one loaded stage. ``post`` gives a job to the MLX thread."""

    def __init__(
        self,
        post: Callable[[Callable[[], None]], None],
        dialer: Dialer,
        throttle: Throttle | None = None,
        disk: PrefixDisk | None = None,
    ) -> None:
        self._post = post
        self._disk = disk
        self._throttle = throttle or Throttle()
        self._dialer = dialer
        self._stage: Stage | None = None
        self._training: TrainingCommands | None = None
        """Takes the place of the stage while it trains."""
        self._ports: _Ports | None = None
        self._inlets: list[Subscription] = []
        self._index = 0
        self._pack_us = 0
        self._earlier_peak = 0
        """The peak of memory before the present training, which measures its own."""

    @property
    def epoch(self) -> int:
        """The loaded stage's epoch; 0 if nothing is loaded."""
        ports = self._ports
        return ports.epoch if ports else 0

    @property
    def term(self) -> int:
        """The term that the loaded stage serves; 0 if nothing is loaded. Any thread may ask."""
        ports = self._ports
        return ports.term if ports else 0

    @property
    def adapters(self) -> tuple[str, ...]:
        """The keys of the adapters that the stage holds. Any thread may ask."""
        return tuple(self._stage.adapters) if self._stage else ()

    @property
    def memory_peak(self) -> int:
        """The peak bytes of this process since its start. Any thread may ask."""
        return max(self._earlier_peak, device.memory_peak())

    @property
    def sequences(self) -> int:
        return self._stage.sequences if self._stage else 0

    def load(
        self, spec: StageSpec, progress: Callable[[int, int], None], term: int = 0, group: Group | None = None
    ) -> None:
        """Load this slice, for a term, in place of the present one. If it is loaded already, only the epoch changes.

        ``group`` is the one that this process has joined. Raises what ``load_stage`` raises, ``StaleEpoch`` for an old
        epoch, and ``StageFailed`` for a rank of another group.
        """
        if (spec.rank, spec.ranks) != ((group.rank(), group.size()) if group else (0, 1)):
            raise StageFailed(f"this engine is not rank {spec.rank} of a group of {spec.ranks}")
        if spec.epoch < self.epoch:
            why = f"asked to load epoch {spec.epoch}, but epoch {self.epoch} is loaded"
            raise StaleEpoch(why, epoch=str(self.epoch))
        self._unlink()
        if not self._try_begin_epoch(spec, progress):
            self.unload()
            stage = load_stage(spec, _folder(spec.model), progress, None if group else self._disk, group)
            if device.compiles() and group is None:  # the others of a group may be minutes away from their first step
                warm(stage)
            self._stage = stage
        self._index, self._ports = spec.index, _Ports.of(spec, term)

    def _try_begin_epoch(self, spec: StageSpec, progress: Callable[[int, int], None]) -> bool:
        """Let the loaded stage serve ``spec`` if it has the same slice; False if not."""
        if self._stage is None:
            return False
        try:
            self._stage.begin_epoch(spec)
        except StaleEpoch:
            return False
        if self._disk:
            self._disk.end_epoch()
        progress(self._stage.weight_bytes, self._stage.weight_bytes)
        return True

    def open_prefixes(
        self, epoch: int, edition: str, owners: Collection[str], *, anonymous: bool
    ) -> list[tuple[int, bytes]]:
        """Let the stage use its prefixes on disk; see ``PrefixDisk.open``.

        Raises ``StaleEpoch``, and ``PrefixMissing`` if there is no disk for them.
        """
        self._require_epoch(epoch, "open prefixes of")
        if self._disk is None or self._stage is None or self._stage.spec.ranks > 1:
            raise PrefixMissing("this worker keeps no prefixes on disk")
        return self._disk.open(self._stage, edition, owners, anonymous=anonymous)

    def set_adapters(self, epoch: int, adapters: Sequence[AdapterRef]) -> None:
        """Let the stage hold just these adapters. Raises ``StaleEpoch``, and as ``Stage.set_adapters``."""
        self._require_epoch(epoch, "set the adapters of")
        if self._stage:
            self._stage.set_adapters({adapter.key: adapter for adapter in adapters})

    def _require_epoch(self, epoch: int, what: str) -> None:
        if epoch != self.epoch:
            why = f"asked to {what} epoch {epoch}, but epoch {self.epoch} is loaded"
            raise StaleEpoch(why, epoch=str(self.epoch))

    def link(self, epoch: int, pull_from: str, peer: str = WORKER, reader: int = 0) -> None:
        """Pull frames from the previous stage, which ``peer`` holds, as this one of its readers.

        Raises ``StaleEpoch``, and ``LinkFailed`` if the peer cannot be reached.
        """
        self._require_epoch(epoch, "link")
        if not pull_from:
            return
        self._close_inlets()
        try:
            for line in Line:
                lost = partial(self._on_inlet_lost, epoch)
                self._inlets.append(self._dialer.pull(pull_from, epoch, self.received, lost, line, peer, reader))
        except (Unreachable, StaleEpoch) as e:
            self._close_inlets()
            raise LinkFailed(e.sentence) from e

    def _close_inlets(self) -> None:
        for inlet in self._inlets:
            inlet.close()
        self._inlets.clear()

    def unload(self) -> None:
        """Free the stage, its caches and its streams, if there is a stage."""
        self._unlink()
        if self._disk:
            self._disk.flush()
            self._disk.end_epoch()
        if self._stage:
            self._stage.close()
        if self._training:
            self._training.close()
        self._stage = self._training = None
        device.release()

    def end_epoch(self) -> None:
        """End the epoch: no frame of it is computed after this. The stage stays loaded, for another epoch."""
        self._unlink()

    def close_streams(self) -> None:
        """Drop the frames that wait, and close the stage's own streams. Any thread may call it.

        The step that is being computed goes on until it ends; ``end_epoch`` waits for it.
        """
        ports, self._ports = self._ports, None
        if ports:
            ports.close()

    def _unlink(self) -> None:
        """End the epoch's streams; the stage stays loaded."""
        self._close_inlets()
        self.close_streams()

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        ports = self._ports
        if ports is None or ports.epoch != epoch or reader >= len(ports.urgent):
            return None
        return (ports.bulk if line is Line.BULK else ports.urgent)[reader]

    def received(self, message: bytes) -> None:
        ports = self._ports
        if ports is None:
            log.warning("stage: frame dropped, nothing is loaded")
            return
        try:
            if is_training(message):
                ports.commands.put(message)
                self._post(lambda: self._run_next_command(ports))
                return
            needs_job = ports.inbox.put(message)
        except BadFrame as e:
            log.warning("stage: closing streams after a bad frame reason=%s", e.sentence)
            ports.close()  # a frame of the log is missing now, so no later frame can be right
            return
        if needs_job:
            self._post(lambda: self._run_next_frame(ports))

    def _on_inlet_lost(self, epoch: int, why: str) -> None:
        """Close the outgoing streams too: the stages behind see the loss, up to the coordinator."""
        log.warning("stage: incoming stream lost reason=%s epoch=%d", why, epoch)
        ports = self._ports
        if ports and ports.epoch == epoch:
            ports.close()

    def _run_next_frame(self, ports: _Ports) -> None:
        """Run the next frame, one per job, so that a command waits for one frame and not for all of them."""
        if self._stage and self._ports is ports and (arrival := ports.inbox.take()):
            self._run_frame(self._stage, ports, arrival)
            if arrival.more:
                self._post(lambda: self._run_next_frame(ports))

    def _run_next_command(self, ports: _Ports) -> None:
        """Run the next command of training and reply to it."""
        message = ports.commands.take()
        if self._ports is not ports:
            return
        started = time.perf_counter_ns()
        try:
            command = decode_command(message)
            reply = self._run_command(command)
        except BadFrame as e:
            log.warning("stage: closing streams after a bad command reason=%s", e.sentence)
            ports.close()
            return
        self._throttle.stretch((time.perf_counter_ns() - started) / 1e9)
        elapsed_us = (time.perf_counter_ns() - started) // 1000
        try:
            sealed = encode_reply(replace(reply, compute_us=elapsed_us))
        except BadFrame as e:  # it is too long
            failure = Failure(self._index, e.reason, e.sentence)
            sealed = encode_reply(TrainingReply(reply.epoch, reply.number, error=failure))
        ports.urgent[0].send(sealed)

    def _run_command(self, command: TrainingCommand) -> TrainingReply:
        try:
            if command.task is Task.PREPARE and self._stage:
                spec = self._stage.spec
                self._stage.close()
                self._stage = None
                self._earlier_peak = self.memory_peak
                device.reset_memory_peak()
                self._training, reply = TrainingCommands.prepare(spec, _folder(spec.model), command)
                return reply
            if self._training is None:
                raise BadFrame("this stage does not train")
            return self._training.run(command)
        except Exception as e:  # MLX or model code may raise anything; it ends the training, not the process
            reason, sentence = classify_error(e)
            unexpected = not isinstance(e, MacpipeError)
            what = command.task.name.lower()
            log.warning("stage: training failed reason=%s task=%s", sentence, what, exc_info=unexpected)
            return TrainingReply(command.epoch, command.number, error=Failure(self._index, reason, sentence))

    def _run_frame(self, stage: Stage, ports: _Ports, arrival: Arrival) -> None:
        """Run one frame and send the result with this stage's timing."""
        frame = arrival.frame
        started = time.perf_counter_ns()
        try:
            result = _run_step(stage, self._index, frame)
        except RankFailed as e:
            log.warning("stage: closing streams, the group is lost reason=%s", e.sentence)
            ports.close()
            return
        if stage.spec.rank:
            return  # rank 0 has the same result and sends it on
        self._throttle.stretch((time.perf_counter_ns() - started) / 1e9)
        computed = time.perf_counter_ns()
        timing = StageTiming(
            self._index,
            wait_us=(started - arrival.at_ns) // 1000,
            compute_us=(computed - started) // 1000,
            pack_us=self._pack_us,
        )
        for parcel in pack(replace(result, timings=(*frame.timings, timing))):
            ports.send(parcel)
        self._pack_us = (time.perf_counter_ns() - computed) // 1000


def _run_step(stage: Stage, index: int, frame: Frame) -> Frame:
    """Return the stage's result. A failed step becomes a frame with an error, so that no later stage waits for it.

    Raises ``RankFailed``: what a rank alone cannot do must not look like a step that all have refused.
    """
    try:
        return stage.step(frame)
    except RankFailed:
        raise
    except Exception as e:  # whatever a forward pass raises must end one request, not the engine
        if not isinstance(e, MacpipeError):
            log.exception("stage: frame failed number=%d lane=%d", frame.number, frame.lane)
        reason, sentence = classify_error(e)
        return replace(frame, tensors=(), error=Failure(index, reason, sentence))


def classify_error(error: Exception) -> tuple[Reason, str]:
    """Return an error's reason and sentence; an unexpected error counts as StageFailed."""
    if isinstance(error, MacpipeError):
        return error.reason, error.sentence
    return StageFailed.reason, f"{type(error).__name__}: {error}"


def _folder(model: ModelRef) -> Path:
    """Return this machine's folder of the model: the coordinator's path, or what the name resolves to here."""
    if Path(model.path).is_dir():
        return Path(model.path)
    try:
        return resolve_model(model.name)
    except MacpipeError as e:
        raise ModelDiffers(
            f"this worker has no copy of {model.name}: there is neither a folder {model.path} nor a model of that name;"
            " copy the folder to the same place"
        ) from e
