"""Which streams a ring opens where stages are groups, with the in-memory data plane."""

from __future__ import annotations

import threading
from collections import Counter

from cluster.coordinator.ring import Ring, RingStage
from cluster.core.plan import Route
from cluster.transport.in_memory import MemoryNetwork
from cluster.transport.streams import Line, Outbox


class Port:
    """A rank's data port: what it received, and an outbox for each reader."""

    def __init__(self, readers: int) -> None:
        self.boxes = {line: [Outbox(1) for _ in range(readers)] for line in Line}
        self.got: list[bytes] = []
        self.arrived = threading.Semaphore(0)

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Outbox | None:
        return self.boxes[line][reader] if reader < len(self.boxes[line]) else None

    def received(self, message: bytes) -> None:
        self.got.append(message)
        self.arrived.release()

    def send(self, message: bytes) -> None:
        for box in self.boxes[Line.URGENT]:
            box.send(message)


class RelayedPair:
    """Two groups of two as two stages, relayed by the coordinator."""

    def __init__(self) -> None:
        self.ports = {"ada": Port(2), "bob": Port(1), "cyd": Port(1), "dee": Port(1)}
        self.network = MemoryNetwork(dict(self.ports))
        self.replies: list[bytes] = []
        self.losses: Counter[str] = Counter()
        self.changed = threading.Semaphore(0)
        seats = (("ada", 0), ("bob", 1), ("cyd", 0), ("dee", 1))
        stages = [RingStage(name, name, Route.RELAY, rank=rank) for name, rank in seats]
        self.ring = Ring(self.network, 1, stages, self._on_reply, self._on_loss)

    def _on_reply(self, message: bytes) -> None:
        self.replies.append(message)
        self.changed.release()

    def _on_loss(self, epoch: int, worker: str, why: str) -> None:
        self.losses[worker] += 1
        self.changed.release()


def test_all_ranks_get_a_frame_and_rank_0_alone_is_read() -> None:
    pair = RelayedPair()
    pair.ring.send(b"tokens")
    pair.ports["ada"].send(b"activations")
    pair.ports["cyd"].send(b"samples")
    for name in pair.ports:
        assert pair.ports[name].arrived.acquire(timeout=10)
    assert pair.changed.acquire(timeout=10)
    pair.ring.close()
    assert [port.got for port in pair.ports.values()] == [[b"tokens"]] * 2 + [[b"activations"]] * 2
    assert pair.replies == [b"samples"]


def test_the_loss_of_any_rank_is_noticed() -> None:
    """One that sends nothing on is watched all the same."""
    pair = RelayedPair()
    pair.network.cut("dee")
    assert pair.changed.acquire(timeout=10)
    pair.ring.close()
    assert set(pair.losses) == {"dee"}
