"""The HTTP port on real sockets: clients that keep connections open for nothing, and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cluster.api.http import connection, server
from cluster.api.http import port_settings as port
from cluster.api.http.authorization import Access, Authorizer, DeclaredRoute
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.server import listen, serve
from cluster.coordinator.settings import HttpSettings, LoadOrder, ServeSettings
from cluster.core.errors import InvalidOption
from cluster.core.limits import FREE_CHUNKS, MIN_CHUNK_BYTES
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.h11_protocol import PIECE
from cluster.security.https import GivenCertificate, HttpCertificate, OwnCertificate
from cluster.security.keyring import make_request

pytestmark = pytest.mark.anyio
HALF = b"POST /echo HTTP/1.1\r\nhost: localhost\r\nx-a: b"
LATE_S = 1.0
MUCH = 64 * 2**20


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", LATE_S)
    monkeypatch.setattr(connection, "LINGER_S", 0.5)
    monkeypatch.setattr(connection, "CLOSE_S", 0.5)
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", LATE_S)
    monkeypatch.setattr(server, "_TICKS", 2)


Wait = Callable[[], Awaitable[None]]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Return a function that waits until the server has swept its connections once more."""
    swept = asyncio.Event()
    on_tick = server._Server.on_tick

    async def tick(running: server._Server, counter: int) -> bool:
        ending = await on_tick(running, counter)
        if counter % server._TICKS == 0:
            swept.set()
        return ending

    async def wait() -> None:
        swept.clear()
        await asyncio.wait_for(swept.wait(), 20)

    monkeypatch.setattr(server._Server, "on_tick", tick)
    return wait


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Return a function that waits until the server has read what was sent since it was called last."""
    read = asyncio.Event()
    data_received = connection.Connection.data_received

    def note(reading: connection.Connection, data: bytes) -> None:
        data_received(reading, data)
        read.set()

    async def wait() -> None:
        await asyncio.wait_for(read.wait(), 20)
        read.clear()

    monkeypatch.setattr(connection.Connection, "data_received", note)
    return wait


async def echo(request: Request) -> Response:
    return Response(f"{len(await request.body())}")


async def refuse(request: Request) -> Response:
    return Response("no", status_code=413)


async def long(request: Request) -> Response:
    """Longer than the time for which a refused body is waited for."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            await asyncio.sleep(0.15)
            yield b"x"

    return StreamingResponse(pieces())


async def much(request: Request) -> Response:
    return Response(bytes(MUCH))


@asynccontextmanager
async def listening(certificate: HttpCertificate | None = None) -> AsyncIterator[tuple[str, int]]:
    posts = [
        Route(path, answer, methods=["POST"]) for path, answer in (("/echo", echo), ("/no", refuse), ("/long", long))
    ]
    routes = [*posts, Route("/much", much)]
    async with serve(Starlette(routes=routes), listen("127.0.0.1", 0), certificate) as address:
        host, _, number = address.rpartition(":")
        yield host, int(number)


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection is closed."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(-1), 20)
    return b""


async def test_200_half_open_connections_are_closed_and_others_are_answered_meanwhile(sweep: Wait) -> None:
    async with listening() as place, httpx.AsyncClient(base_url=f"http://{place[0]}:{place[1]}") as client:
        slow = [await asyncio.open_connection(*place) for _ in range(200)]
        for i, (_, writer) in enumerate(slow):
            writer.write(HALF if i % 2 else b"")

        async def trickle() -> None:
            """One byte at a time does not buy time."""
            while True:
                for _, writer in slow[1::2]:
                    writer.write(b"c")
                await sweep()

        trickling = asyncio.create_task(trickle())
        answered = [(await client.post("/echo", content=b"abc")).text for _ in range(20)]
        ends = await asyncio.gather(*(end_of(reader) for reader, _ in slow))
        trickling.cancel()
        assert answered == ["3"] * 20
        assert (await client.post("/echo", content=b"abcd")).text == "4"
        assert all(end.startswith(b"HTTP/1.1 408 ") for end in ends[0::2])
        assert all(end == b"" or end.startswith(b"HTTP/1.1 408 ") for end in ends[1::2])
        for _, writer in slow:
            writer.close()


async def test_a_second_request_has_to_come_in_time_as_well() -> None:
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
        assert (await reader.readuntil(b"\r\n\r\n1")).startswith(b"HTTP/1.1 200")
        writer.write(HALF)
        began = time.monotonic()
        assert (await end_of(reader)).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began >= LATE_S
        writer.close()


async def test_what_was_refused_before_it_was_read_is_not_read_for_ever(sweep: Wait) -> None:
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST /no HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\nx")
        assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 413")

        async def trickle() -> None:
            while True:
                writer.write(b"x")
                await sweep()

        trickling = asyncio.create_task(trickle())
        assert await end_of(reader) == b""
        trickling.cancel()
        writer.close()


@pytest.mark.parametrize("parts", [[b"3", b"\r\n\r\nab", b"c"], [b"3\r\n\r\n", b"abc"], [b"3\r\n\r\nabc"]])
async def test_what_comes_after_an_early_refusal_is_answered_whole(parts: list[bytes], received: Wait) -> None:
    """Most clients send head and body apart, and use the connection again."""
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST /no HTTP/1.1\r\nhost: localhost\r\ncontent-length: ")
        for part in parts:
            await received()
            writer.write(part)
        assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 413")
        writer.write(b"POST /long HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\nconnection: close\r\n\r\nx")
        said = await end_of(reader)
        assert said.startswith(b"HTTP/1.1 200")
        assert said.endswith(b"\r\n0\r\n\r\n"), "cut off"
        writer.close()


async def test_a_connection_may_rest_after_an_early_refusal_as_after_any_answer(sweep: Wait) -> None:
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST /no HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\n")
        assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 413")
        writer.write(b"x")
        late = time.monotonic() + LATE_S
        while time.monotonic() <= late:
            await sweep()
        await sweep()  # it would close a connection whose head is late
        writer.write(b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
        assert (await reader.readuntil(b"\r\n\r\n1")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_half_a_head_right_after_a_request_has_to_be_completed_in_time() -> None:
    """The first request ends exactly at the end of a piece for the parser, so the half head waits outside of it."""
    head = b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: %05d\r\n\r\n"
    length = PIECE - len(head % PIECE)
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(head % length + b"x" * length + HALF)
        assert (await reader.readuntil(b"\r\n\r\n%d" % length)).startswith(b"HTTP/1.1 200")
        assert (await end_of(reader)).startswith(b"HTTP/1.1 408 ")
        writer.close()


@pytest.mark.parametrize("path", ["/echo", "/no"])
async def test_an_idle_connection_is_closed_also_after_an_early_refusal(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(server, "IDLE_CONNECTION_S", 0.0)
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\n" % path.encode())
        if path == "/no":
            assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 413")
        writer.write(b"x")
        assert (await end_of(reader)).endswith(b"1" if path == "/echo" else b"")
        writer.close()


async def test_a_client_that_takes_nothing_is_cut_when_its_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise its unsent bytes would stay in memory."""
    lost = asyncio.Event()
    connection_lost = connection.Connection.connection_lost

    def note(closed: connection.Connection, exc: Exception | None) -> None:
        connection_lost(closed, exc)
        lost.set()

    monkeypatch.setattr(connection.Connection, "connection_lost", note)
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place, limit=1024)
        writer.write(b"GET /much HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        await asyncio.wait_for(lost.wait(), 20)
        with contextlib.suppress(ConnectionError):
            assert len(await asyncio.wait_for(reader.read(-1), 20)) < MUCH
        writer.close()


async def test_when_all_connections_are_taken_those_who_only_wait_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 60)
    async with listening() as place, httpx.AsyncClient(base_url=f"http://{place[0]}:{place[1]}") as client:
        slow = [await asyncio.open_connection(*place) for _ in range(20)]
        ends = [asyncio.create_task(end_of(reader)) for reader, _ in slow]
        waiting = set(ends)
        while len(waiting) > 8:
            _, waiting = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert (await client.post("/echo", content=b"abc")).text == "3"
        for (_, writer), end in zip(slow, ends, strict=True):
            end.cancel()
            writer.close()


@asynccontextmanager
async def connect(place: tuple[str, int], count: int) -> AsyncIterator[None]:
    """Start that many connections in one turn of the event loop, and wait until the system has them all.

    Those that find its queue full are tried again a second later, and would come after whoever connects meanwhile.
    """
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as begun:
        ready = []
        for _ in range(count):
            one = begun.enter_context(socket.socket())
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(place)
            ready.append(loop.create_future())
            loop.add_writer(one, _set_ready, loop, one, ready[-1])
        await asyncio.gather(*ready)
        yield


def _set_ready(loop: asyncio.AbstractEventLoop, one: socket.socket, ready: asyncio.Future[None]) -> None:
    loop.remove_writer(one)
    ready.set_result(None)


@pytest.mark.parametrize("secure", [False, True])
async def test_a_burst_of_silent_connections_keeps_nobody_out(
    monkeypatch: pytest.MonkeyPatch, folder: ClusterFolder, secure: bool
) -> None:
    """Each newcomer takes another's place, also where all come in one turn, and where hands are not shaken."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 16)
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 60)
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 60)
    own, scheme = (OwnCertificate(folder, ("127.0.0.1",)), "https") if secure else (None, "http")
    async with (
        listening(own) as place,
        httpx.AsyncClient(base_url=f"{scheme}://127.0.0.1:{place[1]}", verify=trusting(folder)) as client,
    ):
        assert (await client.post("/echo", content=b"abc")).text == "3"
        async with connect(place, 200):
            for _ in range(5):
                assert (await client.post("/echo", content=b"abc")).text == "3"
                async with httpx.AsyncClient(verify=trusting(folder)) as newcomer:
                    assert (await newcomer.post(f"{client.base_url}/echo", content=b"ab")).text == "2"


async def test_where_all_places_have_requests_a_newcomer_is_turned_away_and_one_is_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    async with listening() as place:
        busy = [await asyncio.open_connection(*place) for _ in range(4)]
        for reader, writer in busy:
            writer.write(b"POST /long HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        refused, writer = await asyncio.open_connection(*place)
        assert await end_of(refused) == b""
        writer.close()
        for reader, _ in busy:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        async with httpx.AsyncClient() as client:
            assert (await client.post(f"http://127.0.0.1:{place[1]}/echo", content=b"a")).text == "1"
        for _, writer in busy:
            writer.close()


async def test_who_comes_at_the_moment_of_the_end_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end comes in the turn of the event loop that finds a connection; an error in a callback fails the test."""
    late: list[socket.socket] = []
    shutdown = server._Server.shutdown

    async def end(one: server._Server, sockets: list[socket.socket] | None = None) -> None:
        late.extend(socket.create_connection(listener.getsockname(), 20) for listener in sockets or ())
        await asyncio.create_task(shutdown(one, sockets))

    monkeypatch.setattr(server._Server, "shutdown", end)
    async with listening() as (host, port):
        assert await exchange(f"{host}:{port}", b"GET /echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    (newcomer,) = late
    with newcomer, contextlib.suppress(ConnectionError):
        assert newcomer.recv(1) == b""


GARBAGE = (
    b"\x16\x03\x01\r\n\r\n",
    b"GET /secret-word HTTP/9\r\n\r\n",
    b"GET /echo HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: secret-word\r\n\r\n",
    b"POST /no HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nsecret-word\r\n",
)


@pytest.mark.parametrize("sent", GARBAGE, ids=["tls", "version", "upgrade", "chunk"])
async def test_strangers_cannot_write_to_the_log(sent: bytes, caplog: pytest.LogCaptureFixture, sweep: Wait) -> None:
    """Not their words, and of all of their requests a line a minute."""
    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    with caplog.at_level(logging.DEBUG):
        async with listening() as place:
            for _ in range(20):
                _, writer = await asyncio.open_connection(*place)
                writer.write(sent)
                await writer.drain()
                writer.close()
            async with httpx.AsyncClient() as client:
                await client.post(f"http://127.0.0.1:{place[1]}/echo", content=b"a")
            await sweep()  # it reports
    said = [r.getMessage() for r in caplog.records if r.name.startswith(("cluster", "uvicorn.error"))]
    assert not faults
    assert not any("secret-word" in line or "nvalid HTTP" in line or "pgrade" in line for line in said)
    assert sum(line.startswith("http connections closed:") for line in said) <= 1


async def test_garbage_after_an_answer_has_begun_closes_the_connection_and_raises_nothing() -> None:
    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    async with listening() as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST /no HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 413")
        writer.write(b"-1\r\n")
        assert b"HTTP/1.1" not in await end_of(reader)
        writer.close()
    assert not faults


async def exchange(address: str, sent: bytes) -> bytes:
    """Return everything that comes back, even if the connection is reset because the server did not read all input."""
    loop, said = asyncio.get_running_loop(), b""
    host, _, number = address.rpartition(":")
    with socket.socket() as one:
        one.setblocking(False)
        await loop.sock_connect(one, (host, int(number)))
        sending = asyncio.create_task(loop.sock_sendall(one, sent))
        with contextlib.suppress(ConnectionError):
            while part := await loop.sock_recv(one, 65536):
                said += part
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    return said


async def many(request: Request) -> Response:
    return Response(f"{len(request.headers.raw)} headers")


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"], ids=["alone", "pipelined"])
async def test_a_long_head_is_refused_also_where_it_comes_at_once(before: bytes) -> None:
    """h11 bounds a head only while it is incomplete; 50,000 headers would hold the event loop for 60 ms."""
    head = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
    async with serve(Starlette(routes=[Route("/", many)]), listen("127.0.0.1", 0)) as address:
        said = await exchange(address, before + head + b"a:b\r\n" * 40_000 + b"\r\n")
        assert said.count(b" headers") == (1 if before else 0)
        assert said.count(b"HTTP/1.1 ") - said.count(b"HTTP/1.1 400 ") == (1 if before else 0)
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        writer.write(before + head + b"a:b\r\n" * 2_000 + b"connection: close\r\n\r\n")
        assert (await end_of(reader)).endswith(b"2002 headers")
        writer.close()


def chunked(chunks: int, length: int) -> bytes:
    """Return a request whose body has that many chunks of that many bytes."""
    head = b"POST /echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n" % (length, b"a" * length) * chunks + b"0\r\n\r\n"


@pytest.mark.parametrize(("chunks", "length"), [(FREE_CHUNKS + 2, 1), (60_000, 1), (60_000, MIN_CHUNK_BYTES // 2)])
async def test_a_body_in_too_many_chunks_for_its_length_is_refused(chunks: int, length: int) -> None:
    """The parser takes 3 us for each chunk, and all that came in one read is one stretch of the event loop."""
    async with serve(Starlette(routes=[Route("/echo", echo, methods=["POST"])]), listen("127.0.0.1", 0)) as address:
        said = await exchange(address, chunked(chunks, length))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"chunks of the body are too short" in said


@pytest.mark.parametrize(("chunks", "length"), [(FREE_CHUNKS, 1), (4_000, MIN_CHUNK_BYTES)])
async def test_ordinary_chunks_are_taken(chunks: int, length: int) -> None:
    async with serve(Starlette(routes=[Route("/echo", echo, methods=["POST"])]), listen("127.0.0.1", 0)) as address:
        said = await exchange(address, chunked(chunks, length))
    assert said.endswith(b"\r\n\r\n%d" % (chunks * length))


AMBIGUOUS = (
    b"HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n",
    b"HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n",
)


@pytest.mark.parametrize("head", AMBIGUOUS, ids=["cl-te", "te-cl", "te-1.0"])
async def test_a_body_whose_end_is_told_in_two_ways_is_refused_and_what_follows_is_not_read(head: bytes) -> None:
    routes = [DeclaredRoute("/echo", echo, access=Access.INFERENCE, methods=["POST"])]
    guard = RequestMiddleware(Starlette(routes=routes), lambda *_: None, Authorizer(routes))
    async with serve(guard, listen("127.0.0.1", 0)) as address:
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        smuggled = b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx"
        writer.write(b"POST /echo " + head + b"0\r\n\r\n" + smuggled)
        said = await end_of(reader)
        assert said.startswith(b"HTTP/1.1 400")
        assert said.count(b"HTTP/1.1 ") == 1
        writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    folder = ClusterFolder(tmp_path, "lab")
    Authority.make(folder, time.time())
    return folder


def trusting(folder: ClusterFolder) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder.authority))


async def shown(place: tuple[str, int], context: ssl.SSLContext) -> bytes:
    """The certificate that a new connection is shown, and takes."""
    _, writer = await asyncio.open_connection(*place, ssl=context, server_hostname="localhost")
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


async def test_https_shows_the_clusters_certificate_and_a_renewed_one_without_a_restart(
    folder: ClusterFolder, sweep: Wait
) -> None:
    now = [time.time() - 61 * 86_400]
    own = OwnCertificate(folder, ("localhost", "127.0.0.1", "mac-1.local"), lambda: now[0])
    assert {p.stat().st_mode & 0o777 for p in (folder.path / "http").iterdir()} == {0o600}
    async with listening(own) as place:
        first = await shown(place, trusting(folder))
        async with httpx.AsyncClient(verify=trusting(folder)) as client:
            assert (await client.post(f"https://127.0.0.1:{place[1]}/echo", content=b"a")).text == "1"
        with pytest.raises(ssl.SSLCertVerificationError):
            await shown(place, ssl.create_default_context())
        now[0] += 61 * 86_400
        await sweep()  # it renews the certificate
        assert await shown(place, trusting(folder)) != first


async def test_hands_that_are_not_shaken_are_taken_back(folder: ClusterFolder) -> None:
    own = OwnCertificate(folder, ("localhost",))
    async with listening(own) as place:
        silent = [await asyncio.open_connection(*place) for _ in range(50)]
        assert await shown(place, trusting(folder))
        assert [await end_of(reader) for reader, _ in silent] == [b""] * 50
        for _, writer in silent:
            writer.close()


async def test_a_given_certificate_is_read_again_when_it_changes(
    folder: ClusterFolder, tmp_path: Path, sweep: Wait
) -> None:
    files = tmp_path / "mine.pem", tmp_path / "mine-key.pem"

    def issue() -> None:
        key, request = make_request()
        files[1].write_bytes(key)
        files[0].write_bytes(Authority.load(folder).sign_http(request, ["localhost"], time.time()))

    with pytest.raises(InvalidOption, match="http-cert"):
        GivenCertificate(*files)
    issue()
    async with listening(GivenCertificate(*files)) as place:
        first = await shown(place, trusting(folder))
        files[0].write_text("half of a renewal")
        await sweep()  # it looks at the files
        assert await shown(place, trusting(folder)) == first
        issue()
        await sweep()
        assert await shown(place, trusting(folder)) != first


Settings = Callable[..., ServeSettings]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return lambda host, **more: ServeSettings(
        LoadOrder("faq"), tmp_path, cluster="lab", http=HttpSettings((host, 0), **more)
    )


def test_off_this_machine_there_is_no_http_without_a_cluster_whatever_is_given(settings: Settings) -> None:
    given = (Path("a"), Path("b"))
    for more in ({}, {"certificate": given}, {"hosts": ("mac",), "origins": ("https://x.example",)}):
        for host in ("0.0.0.0", "::", "192.0.2.7", "mac-1.local"):  # noqa: S104
            with pytest.raises(InvalidOption, match="open to everybody"):
                port.http_port(settings(host, **more))
    assert port.http_port(settings("127.0.0.1")).keys is None


def test_with_a_cluster_there_are_keys_everywhere_and_tls_on_the_network(
    settings: Settings, folder: ClusterFolder
) -> None:
    inside, outside = port.http_port(settings("127.0.0.1")), port.http_port(settings("192.0.2.7"))
    assert inside.keys is not None
    assert inside.certificate is None
    assert outside.keys is not None
    assert outside.certificate is not None
    assert {"192.0.2.7", "lab.local"} <= outside.sites.hosts
    assert "lab.local" in certified_names(folder.path / "http" / "certificate.pem")
    assert "192.0.2.7" not in inside.sites.hosts


def certified_names(certificate: Path) -> list[str]:
    names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions
    return names.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def test_a_mac_that_does_not_lead_the_cluster_needs_a_certificate_of_its_own(
    settings: Settings, folder: ClusterFolder
) -> None:
    folder.authority_key.unlink()
    outside = port.http_port(settings("192.0.2.7"))
    assert "comes from the coordinator's Mac" in outside.problem
    assert outside.certificate is None
    assert {"192.0.2.7", "lab.local"} <= outside.sites.hosts, "known before its certificate comes"
