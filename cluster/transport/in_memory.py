"""An in-memory data plane for tests: the same interface within one process, with fault injection."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.core.errors import StaleEpoch, Unreachable
from cluster.security.trust import WORKER
from cluster.transport.grpc_streams import Stages
from cluster.transport.streams import Line, Lost, Outbox, Received, Sender, Subscription

Fault = Callable[[bytes], bytes | None]
"""Called with each message to or from an address. The return value is delivered; for None, the message is lost."""


def _no_fault(message: bytes) -> bytes | None:
    return message


@dataclass
class MemoryNetwork:
    """Data ports by address. ``faults``, also by address, apply to messages sent to or pulled from that address."""

    ports: dict[str, Stages] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    _streams: dict[str, list[_MemoryStream]] = field(default_factory=dict)

    def cut(self, address: str) -> None:
        """Break every stream with an address, as a crashed host does."""
        for stream in self._streams.pop(address, []):
            stream.break_off()

    def feed(self, address: str, epoch: int, lost: Lost, line: Line = Line.URGENT, peer: str = WORKER) -> Sender:
        stages, _ = self._reach(address, epoch, line)
        return self._keep(address, _MemoryStream(Outbox(epoch), self._faulty(address, stages.received), lost))

    def pull(
        self,
        address: str,
        epoch: int,
        received: Received,
        lost: Lost,
        line: Line = Line.URGENT,
        peer: str = WORKER,
        reader: int = 0,
    ) -> Subscription:
        _, outbox = self._reach(address, epoch, line, reader)
        if not outbox.take():
            raise Unreachable(
                f"cannot open a data stream to {address}: another reader already pulls this stage's frames"
            )
        return self._keep(address, _MemoryStream(outbox, self._faulty(address, received), lost))

    def _reach(self, address: str, epoch: int, line: Line, reader: int = 0) -> tuple[Stages, Outbox]:
        if address not in self.ports:
            raise Unreachable(f"cannot open a data stream to {address}: nothing listens there")
        outbox = self.ports[address].outbox(epoch, line, reader)
        if outbox is None:
            raise StaleEpoch(f"{address} refused a stream: no stage of epoch {epoch} is loaded here")
        return self.ports[address], outbox

    def _faulty(self, address: str, deliver: Received) -> Received:
        def received(message: bytes) -> None:
            kept = self.faults.get(address, _no_fault)(message)
            if kept is not None:
                deliver(kept)

        return received

    def _keep(self, address: str, stream: _MemoryStream) -> _MemoryStream:
        self._streams.setdefault(address, []).append(stream)
        return stream


class _MemoryStream:
    def __init__(self, outbox: Outbox, deliver: Received, lost: Lost) -> None:
        self._outbox, self._deliver, self._lost = outbox, deliver, lost
        self._closed = False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        for message in self._outbox:
            self._deliver(message)
        if not self._closed:
            self._lost("the data stream broke")

    def send(self, message: bytes) -> None:
        self._outbox.send(message)

    def break_off(self) -> None:
        self._outbox.close()

    def close(self) -> None:
        self._closed = True
        self._outbox.close()
