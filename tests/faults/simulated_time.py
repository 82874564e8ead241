"""Simulated time: a clock that jumps to the next timer once nothing else is left to do, and what runs by it.

One event loop runs everything, the coordinator's engine loop and all data streams included, so that a slow machine
changes no order and no duration: a simulation takes as long as its computation, and a seed plays the same game again.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from cluster.coordinator import draft_service, epoch, heartbeat, recovery, service
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.job_queue import Job, JobQueue
from cluster.coordinator.ring import Ring
from cluster.core.errors import MacpipeError, StaleEpoch, Unreachable
from cluster.scheduler.disk_prefixes import DiskContents
from cluster.security.trust import WORKER
from cluster.transport.streams import Line, Lost, Received

T = TypeVar("T")
Fault = Callable[[bytes], bytes | None]
"""Called with each message to or from an address. The return value is delivered; for None, the message is lost."""
HOP_S = 0.0005
"""Maximum time that a message takes, which is drawn for each."""


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing but wakes: where it would wait for a timer, it moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if timeout is None and not ready:
            raise RuntimeError("the simulation waits for something that nothing in it will do")
        if timeout and timeout > 0 and not ready:
            self.now += timeout
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is simulated. No thread may have a part in what it runs."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_simulated(play: Coroutine[Any, Any, T]) -> T:
    """Run ``play`` by simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(play)


def simulated_now() -> float:
    return asyncio.get_running_loop().time()


def use_simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the coordinator read the simulated clock, and start no thread."""
    for module in (draft_service, epoch, heartbeat, recovery, service):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=simulated_now))
    monkeypatch.setattr("anyio.to_thread.run_sync", _run_here)
    monkeypatch.setattr(service, "EngineLoop", SimulatedEngineLoop)


async def _run_here(call: Callable[..., T], *given: Any) -> T:
    await asyncio.sleep(0)
    return call(*given)


class _Inbox(JobQueue):
    """A job queue whose reader is a task of the same event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._filled = asyncio.Event()

    def put(self, job: Job) -> bool:
        self._filled.set()
        return super().put(job)

    def close(self) -> None:
        super().close()
        self._filled.set()

    async def wait(self, wait_s: float | None) -> Job | None:
        """Return the next job; None once closed. Raises TimeoutError after ``wait_s``; None waits for ever."""
        async with asyncio.timeout(wait_s):
            while self._jobs.empty():
                self._filled.clear()
                await self._filled.wait()
        return self.get(0)


class SimulatedEngineLoop(EngineLoop):
    """The engine loop as a task in place of a thread."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more, clock=simulated_now)
        self._inbox: _Inbox = _Inbox()
        self._driving: asyncio.Task[None] | None = None

    def start(self, ring: Ring, disk: DiskContents | None = None) -> None:
        self._ring = ring
        self._scheduler.disk.open(disk)
        self._driving = asyncio.create_task(self._drive())

    def stop(self, error: MacpipeError) -> None:
        self._inbox.put(lambda: self._refuse(error))
        self._inbox.close()
        if self._driving and not self._driving.done():
            self._driving.cancel()
            while job := self._inbox.get(0):
                self._do(job)

    async def _drive(self) -> None:
        """Do what ``_run`` does."""
        while True:
            wait_s = self._wait_s()
            if wait_s == 0.0:
                self._do(self._check_deadlines)
                wait_s = self._wait_s()
            try:
                job = await self._inbox.wait(wait_s)
            except TimeoutError:
                continue
            if job is None:
                return
            self._do(job)


class Box:
    """A stage's messages of one epoch for its one reader, as ``Outbox``."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.closed = False
        self._waiting: deque[bytes] = deque()
        self._stream: _Stream | None = None

    def send(self, message: bytes) -> None:
        if not self.closed:
            self._waiting.append(message)
            self._pump()

    def close(self) -> None:
        """End the reader after the waiting messages."""
        if not self.closed:
            self.closed = True
            self._pump()

    def take(self, stream: _Stream) -> bool:
        """Claim the box for ``stream``. Return False if it is taken."""
        if self._stream:
            return False
        self._stream = stream
        self._pump()
        return True

    def _pump(self) -> None:
        while self._stream and self._waiting:
            self._stream.carry(self._waiting.popleft())
        if self._stream and self.closed:
            self._stream.end()


class _Stream:
    """Carries messages one after the other, each for a time of its own."""

    def __init__(self, network: SimulatedNetwork, address: str, deliver: Received, lost: Lost) -> None:
        self._network, self._address, self._deliver, self._lost = network, address, deliver, lost
        self._free_at = 0.0
        self.box: Box | None = None
        self._closed = False

    def carry(self, message: bytes) -> None:
        self._later(lambda: self._arrive(message))

    def end(self) -> None:
        self._later(self._break)

    def send(self, message: bytes) -> None:
        assert self.box
        self.box.send(message)

    def break_off(self) -> None:
        assert self.box
        self.box.close()

    def close(self) -> None:
        self._closed = True
        self.break_off()

    def _later(self, do: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._free_at = max(loop.time(), self._free_at) + self._network.hop_s(self._address)
        loop.call_at(self._free_at, do)

    def _arrive(self, message: bytes) -> None:
        kept = self._network.faults.get(self._address, _deliver_all)(message)
        if kept is not None:
            self._deliver(kept)

    def _break(self) -> None:
        if not self._closed:
            self._lost("the data stream broke")


def _deliver_all(message: bytes) -> bytes:
    return message


class Port:
    """A Mac's data port."""

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Box | None:
        """Return the messages of a line; None if no stage of that epoch is loaded."""
        raise NotImplementedError

    def received(self, message: bytes) -> None:
        raise NotImplementedError


@dataclass
class SimulatedNetwork:
    """Data ports by address, which ``rng`` gives the messages' times. ``faults`` and ``delays_s`` are by address."""

    rng: random.Random
    ports: dict[str, Port] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    delays_s: dict[str, float] = field(default_factory=dict)
    _streams: dict[str, list[_Stream]] = field(default_factory=dict)

    def hop_s(self, address: str) -> float:
        """Return how long the next message to or from an address takes."""
        return self.delays_s.get(address, 0.0) + self.rng.random() * HOP_S

    def cut(self, address: str) -> None:
        """Break every stream with an address, as a crashed host does."""
        for stream in self._streams.pop(address, []):
            stream.break_off()

    def feed(self, address: str, epoch: int, lost: Lost, line: Line = Line.URGENT, peer: str = WORKER) -> _Stream:
        port, _ = self._reach(address, epoch, line)
        return self._open(address, Box(epoch), port.received, lost)

    def pull(
        self,
        address: str,
        epoch: int,
        received: Received,
        lost: Lost,
        line: Line = Line.URGENT,
        peer: str = WORKER,
        reader: int = 0,
    ) -> _Stream:
        _, box = self._reach(address, epoch, line)
        return self._open(address, box, received, lost)

    def _open(self, address: str, box: Box, deliver: Received, lost: Lost) -> _Stream:
        stream = _Stream(self, address, deliver, lost)
        if not box.take(stream):
            raise Unreachable(f"another reader already pulls the frames of {address}")
        stream.box = box
        self._streams.setdefault(address, []).append(stream)
        return stream

    def _reach(self, address: str, epoch: int, line: Line) -> tuple[Port, Box]:
        port = self.ports.get(address)
        if port is None:
            raise Unreachable(f"cannot open a data stream to {address}: nothing listens there")
        box = port.outbox(epoch, line)
        if box is None:
            raise StaleEpoch(f"{address} refused a stream: no stage of epoch {epoch} is loaded here")
        return port, box
