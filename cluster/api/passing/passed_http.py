"""The HTTP port of a standby: it checks Host and Origin, and has the coordinator that leads answer all that is not
about the standby itself.

If the leader is lost, the standby sends the request to the next one. A stream goes on there behind the events that the
client has, or ends with an event that tells why not; any other response must not have begun.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any, Final

import grpc
from grpc import aio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.http.caller_identity import client_name
from cluster.api.http.errors import error_response
from cluster.api.http.middleware import ambiguity_error, is_ambiguous
from cluster.api.http.origin_policy import OriginPolicy
from cluster.api.http.passed_answer import CountedEvents
from cluster.api.http.sse import EVENTS, JSON_LINES, error_event
from cluster.api.passing.leader_channel import LeaderChannel, StandbyRemoved
from cluster.api.passing.passed_calls import LOST, never_reached
from cluster.core.errors import Aborted, AnswerLost, ConnectionLost, MacpipeError, MemberRemoved, NotLeader, NotServing
from cluster.core.follow_limits import FOLLOW_PAUSE_S, FOLLOW_S, MAX_FOLLOW_PAUSE_S, PASS_WAIT_S
from cluster.transport.byte_budget import ByteBudget, Charge
from cluster.transport.rich_errors import STATUS_METADATA_KEY, from_rpc_error
from cluster.v1 import leader_pb2 as pb
from cluster.v1.leader_pb2_grpc import LeaderServiceStub

_REPEATABLE: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/tokenize",
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/api/embeddings",
        "/api/show",
        "/api/answer",
    }
)
"""Routes whose requests may be sent again: they change nothing, or are answered once under their id."""
_PROBES: Final = frozenset({"/health", "/ready"})
"""Routes whose requests ask whether requests are answered now, so they do not wait for somebody to lead."""
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_STREAMS: Final = frozenset({EVENTS, JSON_LINES})


def passing_application(
    leader: LeaderChannel,
    origins: OriginPolicy,
    bodies: ByteBudget | None = None,
    wait_s: float = PASS_WAIT_S,
    own: Mapping[str, ASGIApp] | None = None,
) -> ASGIApp:
    """Return the HTTP application of a standby. ``bodies`` counts the requests that it holds.

    A new request waits ``wait_s`` seconds for somebody to lead. ``own`` are the applications, by their paths, that
    answer for the standby itself and check whatever they need.
    """
    own = own or {}
    passed = origins.with_cors(PassedHttp(leader, bodies or ByteBudget(), wait_s))

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if app := own.get(scope["path"]):
            await app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if is_ambiguous(scope, headers):
            refusal = error_response(scope["path"], ambiguity_error())
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        try:
            origins.check(headers)
        except MacpipeError as e:
            await error_response(scope["path"], e)(scope, receive, send)
            return
        await passed(scope, receive, send)

    return application


class PassedHttp:
    """Passes each request on to the leader, and the response back as it comes."""

    def __init__(self, leader: LeaderChannel, bodies: ByteBudget, wait_s: float) -> None:
        self._leader, self._bodies, self._wait_s = leader, bodies, wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _PassedReply(send)
        try:
            with self._bodies.open(client_name(Request(scope))) as charge:
                await self._pass_on(_PassedRequest(scope, receive, charge), reply)
        except MacpipeError as e:
            if not reply.started:
                await error_response(scope["path"], e)(scope, receive, send)
            elif reply.can_continue:
                await reply.fail(error_event(scope["path"], e))

    async def _pass_on(self, request: _PassedRequest, reply: _PassedReply) -> None:
        """Have whoever leads answer. Raises ``MacpipeError`` if nobody does, or not to the end."""
        reading = asyncio.ensure_future(request.read())
        try:
            await self._try_leaders(request, reply)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _try_leaders(self, request: _PassedRequest, reply: _PassedReply) -> None:
        pause_s, began = FOLLOW_PAUSE_S, time.monotonic()
        while True:
            try:
                await self._try(request, reply)
                return
            except StandbyRemoved:
                raise
            except (NotLeader, ConnectionLost, NotServing) as e:
                if isinstance(e, ConnectionLost):
                    began = time.monotonic() if not request.resumed else began
                    request.resumed = True
                longest = FOLLOW_S if request.resumed else self._wait_s
                longest = 0.0 if request.is_probe else longest
                again = reply.can_continue and (request.is_repeatable or not request.resumed)
                if not again or time.monotonic() - began >= longest:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_FOLLOW_PAUSE_S)

    async def _try(self, request: _PassedRequest, reply: _PassedReply) -> None:
        address, channel = self._leader.open()
        over = asyncio.Event()
        call: Any = LeaderServiceStub(channel).PassHttp(request.parts(reply.events, over))
        watching = asyncio.ensure_future(request.cancel_at_end(call))
        try:
            async for response in call:
                await reply.take(response, request)
            await reply.end()
        except aio.AioRpcError as e:
            if request.refusal:
                raise request.refusal from e
            raise self._explain(e, address) from e
        except asyncio.CancelledError:
            if request.refusal:
                raise request.refusal from None
            if not request.disconnected:
                raise
            raise Aborted("the client disconnected") from None
        finally:
            watching.cancel()
            over.set()  # gRPC goes on to wait for a part of the request if the call has ended by itself
            request.wake()
            call.cancel()

    def _explain(self, error: aio.AioRpcError, address: str) -> MacpipeError:
        known = from_rpc_error(error, address)
        trailing: Any = error.trailing_metadata() or ()
        carried = any(key == STATUS_METADATA_KEY for key, _ in trailing)
        if isinstance(known, MemberRemoved) and not carried:
            return StandbyRemoved()  # the leader has not looked at the client's key
        if carried or error.code() not in LOST:
            return known
        if error.code() is grpc.StatusCode.UNAVAILABLE and never_reached(error, address):
            return self._leader.leave(address)
        return ConnectionLost(f"the coordinator that leads was lost at {address}; send the request again")


class _PassedReply:
    """The response to a client. ``events`` are those of a stream that the client has."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self._streams = False
        self.events = CountedEvents()

    @property
    def can_continue(self) -> bool:
        """Whether another leader may still answer."""
        return not self.started or self._streams

    async def take(self, part: pb.PassHttpResponse, request: _PassedRequest) -> None:
        """Send the next part of the leader's response.

        Raises ``NotServing`` for a new leader that cannot answer yet, and ``ConnectionLost`` if it has no such stream.
        """
        if part.HasField("head"):
            await self._begin(part.head, resumed=request.resumed)
            return
        if self._streams:
            self.events.add(part.body, part.part_of_answer)
        await self._send({"type": "http.response.body", "body": part.body, "more_body": True})

    async def _begin(self, head: pb.HttpResponseHead, *, resumed: bool) -> None:
        if resumed and head.status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise NotServing("the coordinator that leads now does not serve yet")
        headers = [(header.name, header.value) for header in head.headers]
        if self.started:
            if head.status != HTTPStatus.OK:
                raise AnswerLost("the coordinator that leads now cannot continue the answer; send the request again")
            return
        self.started = True
        self._streams = head.status == HTTPStatus.OK and any(
            name.lower() == b"content-type" and value in _STREAMS for name, value in headers
        )
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def end(self) -> None:
        """Complete the response. Raises ``ConnectionLost`` if there is none."""
        if not self.started:
            raise ConnectionLost("the coordinator that leads sent no response; send the request again")
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, event: bytes) -> None:
        """End a stream with an event that tells why."""
        await self._send({"type": "http.response.body", "body": event})


class _PassedRequest:
    """The request of a client, and whether the client is still there.

    ``resumed``: a leader that was lost may have begun to answer. ``refusal``: it is too large to be held.
    """

    def __init__(self, scope: Scope, receive: Receive, charge: Charge) -> None:
        self._receive, self._charge = receive, charge
        self._head = _head(scope)
        self._body: list[bytes] = []
        self._more = True
        self._changed = asyncio.Event()
        """Set, and replaced, when there is more of the request, or nothing more to wait for."""
        self.is_probe = scope["path"] in _PROBES
        self.is_repeatable = scope["method"] in _SAFE or scope["path"] in _REPEATABLE
        self.resumed = False
        self.refusal: MacpipeError | None = None
        self.disconnected = False

    async def read(self) -> None:
        """Take the body as it arrives, once for all leaders, then wait until the client has left.

        Ends early if the request may not be held.
        """
        while not self._is_over:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.disconnected = True
            elif self._more:
                self._take(message)
            self.wake()

    def _take(self, message: Message) -> None:
        piece = message.get("body", b"")
        try:
            self._charge.add(len(piece))
        except MacpipeError as e:
            self.refusal = e
            return
        if piece:
            self._body.append(piece)
        self._more = message.get("more_body", False)

    @property
    def _is_over(self) -> bool:
        """Whether nobody waits for an answer any more, or nothing may be answered."""
        return self.disconnected or self.refusal is not None

    def wake(self) -> None:
        """Let those that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def parts(self, known: CountedEvents, over: asyncio.Event) -> AsyncIterator[pb.PassHttpRequest]:
        """Yield the parts of the request for one leader, until ``over`` is set."""
        head = pb.HttpRequestHead()
        head.CopyFrom(self._head)
        head.resumed = self.resumed
        for part, has in known.all_known.items():
            head.known.add(part=part, events=has.events, digest=has.digest)
        yield pb.PassHttpRequest(head=head)
        sent = 0
        while not over.is_set():
            if sent < len(self._body):
                yield pb.PassHttpRequest(body=self._body[sent])
                sent += 1
            elif self._more and not self._is_over:
                await self._changed.wait()
            else:
                return

    async def cancel_at_end(self, call: Any) -> None:
        """Cancel ``call`` once the client has left, or if its request may not be held."""
        while not self._is_over:
            await self._changed.wait()
        call.cancel()


def _head(scope: Scope) -> pb.HttpRequestHead:
    client = scope.get("client")
    return pb.HttpRequestHead(
        method=scope["method"],
        path=scope["path"],
        query=scope.get("query_string", b""),
        headers=[pb.HttpHeader(name=name, value=value) for name, value in scope["headers"]],
        client=client[0] if client else "",
        encrypted=scope.get("scheme") == "https",
        request_id=secrets.token_hex(12),
        created=time.time(),
    )
