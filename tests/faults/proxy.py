"""A TCP proxy between any two parties, whose links can be cut, slowed, damaged and reset while in use.

It runs on an event loop of its own thread. Each worker's ports are reached through an address of its own; who has
connected is found from the kernel's table of sockets, so that the link between coordinator and worker and the one
between two workers can be told apart.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK = 16384
Who = Callable[[int, int], str]
"""The party that owns a connected socket, by its local port and the port that it is connected to: systems give a local
port to several sockets whose other ends differ.
"""


@dataclass
class Link:
    """The state of the link between two parties. ``blocked`` has the receivers that nothing reaches."""

    blocked: set[str] = field(default_factory=set)
    delay_s: float = 0.0
    rate: float = 0.0
    """Bytes a second in each direction of each connection; 0: as fast as it goes."""
    corrupt: int = 0
    """Chunks of the data plane that are still to be damaged."""

    def heal(self) -> None:
        self.blocked.clear()
        self.delay_s = self.rate = 0.0
        self.corrupt = 0


@dataclass(eq=False)
class _Connection:
    parties: frozenset[str]
    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]

    def reset(self) -> None:
        """End it as a machine that has forgotten it does."""
        for writer in self.writers:
            with suppress(OSError, AttributeError):
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """All proxied ports of one fleet."""

    def __init__(self, who: Who, rng: random.Random) -> None:
        self._who, self._rng = who, rng
        self.links: dict[frozenset[str], Link] = {}
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def link(self, a: str, b: str) -> Link:
        return self.links.setdefault(frozenset((a, b)), Link())

    def listen(self, host: str, port: int, party: str, *, data: bool) -> None:
        """Pass on what comes to ``host:port`` to the same port of 127.0.0.1, where ``party`` listens."""
        self._run(self._listen(host, port, party, data))

    def refuse(self, host: str, port: int) -> None:
        """Refuse connections, as a system does whose process has ended, until ``listen`` is called again."""
        self._run(self._refuse(host, port))

    def reset(self, a: str, b: str) -> int:
        """Reset every connection between two parties; how many there were."""
        return self._run(self._reset(frozenset((a, b))))

    def heal(self) -> None:
        for link in self.links.values():
            link.heal()

    def close(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    async def _listen(self, host: str, port: int, party: str, data: bool) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer, party, port, data))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if (host, port) not in self._servers:
            self._servers[host, port] = await asyncio.start_server(accepted, host, port)

    async def _refuse(self, host: str, port: int) -> None:
        if server := self._servers.pop((host, port), None):
            server.close()

    async def _reset(self, parties: frozenset[str]) -> int:
        hit = [c for c in self._connections if c.parties == parties]
        for connection in hit:
            connection.reset()
        return len(hit)

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # aborted transports close in the loop's next turns

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, party: str, port: int, data: bool
    ) -> None:
        caller = self._who(writer.get_extra_info("peername")[1], port)
        try:
            onward, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(frozenset((caller, party)), (writer, back))
        self._connections.add(connection)
        link = self.link(caller, party)
        try:
            await asyncio.gather(
                self._pump(reader, back, link, party, data), self._pump(onward, writer, link, caller, data)
            )
        finally:
            self._connections.discard(connection)
            for end in (writer, back):
                end.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: Link, receiver: str, data: bool
    ) -> None:
        arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        deliver = asyncio.create_task(self._deliver(arrived, sink, link, receiver, data))
        try:
            while (chunk := await source.read(CHUNK)) and not deliver.done():
                await arrived.put((time.monotonic(), chunk))
            await arrived.put((time.monotonic(), b""))
            await deliver
        except OSError:
            sink.transport.abort()
        finally:
            deliver.cancel()

    async def _deliver(
        self,
        arrived: asyncio.Queue[tuple[float, bytes]],
        sink: asyncio.StreamWriter,
        link: Link,
        receiver: str,
        data: bool,
    ) -> None:
        free_at = 0.0
        while True:
            at, chunk = await arrived.get()
            while receiver in link.blocked:
                await asyncio.sleep(0.02)
            due = max(at + link.delay_s, free_at)
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if not chunk:
                with suppress(OSError):
                    sink.write_eof()
                return
            if data and link.corrupt and len(chunk) > 200:
                link.corrupt -= 1
                chunk = self._damaged(chunk)
            free_at = time.monotonic() + (len(chunk) / link.rate if link.rate else 0.0)
            try:
                sink.write(chunk)
                await sink.drain()
            except OSError:
                return

    def _damaged(self, chunk: bytes) -> bytes:
        """One bit flipped, past the framing at the chunk's beginning."""
        at = self._rng.randrange(len(chunk) // 2, len(chunk))
        return chunk[:at] + bytes([chunk[at] ^ (1 << self._rng.randrange(8))]) + chunk[at + 1 :]


def owner(port: int, there: int, pids: dict[int, str]) -> str:
    """Whose socket goes from local port ``port`` to port ``there``, among the processes ``pids``; empty where it is
    nobody's.
    """
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))  # gRPC speaks IPv4 through sockets of the other family
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if (_port(row[1]), _port(row[2])) == (port, there)}
    for pid, name in pids.items():
        with suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if str(fd.readlink()) in inodes:
                        return name
    return ""


def _port(address: str) -> int:
    """Parse ``0100007F:1F90``, as the kernel writes it."""
    return int(address.rpartition(":")[2], 16)
