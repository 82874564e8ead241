"""Decides what each stage does next in training, so that stages overlap and every sum keeps the order of one process.

A batch passes forward through all stages and back to the lowest stage that trains anything. A stage runs what it is
sent in order. So a batch may be sent to a stage once the updates before that batch have been sent there; stages that
train nothing run ahead. It is pure: it is told of replies, and returns orders.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.core.frames import Tensor
from cluster.core.training_frames import DataBatch, Purpose, Task, TrainingReply

__all__ = ["BatchResult", "TrainingOrder", "TrainingSchedule"]


@dataclass(frozen=True, slots=True)
class TrainingOrder:
    """What a stage is to do with a batch: FORWARD or BACKWARD. The other fields are those of ``TrainingCommand``."""

    stage: int
    task: Task
    batch: DataBatch
    tensors: tuple[Tensor, ...]
    gradient: bool
    update: bool


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch that is done: its mean loss over ``counted`` tokens, and the learning rate after it."""

    batch: DataBatch
    loss: float
    counted: int
    learning_rate: float


@dataclass(slots=True)
class _Flight:
    """A batch on its way. ``version`` counts the updates before it; ``update``: one follows it."""

    batch: DataBatch
    version: int
    update: bool
    loss: float = 0.0
    counted: int = 0


@dataclass(slots=True)
class _Stage:
    """What waits for one stage, and what was sent to it without a reply yet. ``version`` counts the updates sent."""

    forward: deque[tuple[_Flight, tuple[Tensor, ...]]] = field(default_factory=deque)
    backward: deque[tuple[_Flight, tuple[Tensor, ...]]] = field(default_factory=deque)
    sent: deque[tuple[_Flight, Task]] = field(default_factory=deque)
    version: int = 0


class TrainingSchedule:
    """The batches of one epoch. ``lowest`` is the first stage that trains anything."""

    def __init__(self, stages: int, lowest: int) -> None:
        self._stages = [_Stage() for _ in range(stages)]
        self._last, self._lowest = stages - 1, lowest
        self._version = 0
        self._window = stages + 1
        self._in_flight: dict[int, _Flight] = {}
        self._done: dict[int, BatchResult] = {}

    @property
    def wants(self) -> bool:
        """Whether another batch can be started soon."""
        return len(self._stages[0].forward) < 1

    @property
    def idle(self) -> bool:
        """Whether no batch is on its way."""
        return not self._in_flight and not self._stages[0].forward

    def add(self, batch: DataBatch, *, update: bool = False) -> None:
        """Add the next batch. ``update``: the adapters are updated after it."""
        self._stages[0].forward.append((_Flight(batch, self._version, update), ()))
        self._version += update

    def next_orders(self) -> list[TrainingOrder]:
        """Return what is to be sent now."""
        orders: list[TrainingOrder] = []
        for i, stage in enumerate(self._stages):
            while stage.backward:
                orders.append(self._send(i, Task.BACKWARD, *stage.backward.popleft()))
            while stage.forward and self._may_send(i, stage.forward[0][0]):
                orders.append(self._send(i, Task.FORWARD, *stage.forward.popleft()))
        return orders

    def _may_send(self, index: int, flight: _Flight) -> bool:
        if index == 0 and len(self._in_flight) >= self._window:
            return False
        return index < self._lowest or self._stages[index].version == flight.version

    def _send(self, index: int, task: Task, flight: _Flight, tensors: tuple[Tensor, ...]) -> TrainingOrder:
        self._in_flight[flight.batch.number] = flight
        stage = self._stages[index]
        updates = flight.update and (task is Task.BACKWARD or index == self._last)
        stage.version += updates
        stage.sent.append((flight, task))
        return TrainingOrder(index, task, flight.batch, tensors, index > self._lowest, updates)

    def on_reply(self, index: int, reply: TrainingReply) -> list[BatchResult]:
        """Take the reply to the oldest order of a stage. Return the batches that are done now, in their order."""
        flight, task = self._stages[index].sent.popleft()
        if index == self._last:
            flight.loss, flight.counted = reply.loss, reply.counted
        if task is Task.FORWARD and index < self._last:
            self._stages[index + 1].forward.append((flight, reply.tensors))
        elif flight.batch.purpose is Purpose.TRAIN and index > self._lowest:
            self._stages[index - 1].backward.append((flight, reply.tensors))
        else:
            self._done[flight.batch.number] = BatchResult(
                flight.batch, flight.loss, flight.counted, reply.learning_rate
            )
        return self._take_done()

    def _take_done(self) -> list[BatchResult]:
        """Return the results before which no batch is on its way."""
        taken: list[BatchResult] = []
        while self._in_flight and (result := self._done.pop(next(iter(self._in_flight)), None)):
            del self._in_flight[result.batch.number]
            taken.append(result)
        return taken
