"""The gRPC LeaderService, by which the coordinators of one cluster know of each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import anyio.to_thread
import grpc
from starlette.types import ASGIApp

from cluster.api.grpc.follow_call import serve_follow
from cluster.api.passing.http_answers import answer_passed
from cluster.codec.leadership import decode_claim, encode_leads_response, encode_stored_edit
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.state_files import adopt_edit
from cluster.core.errors import ConnectionLost, MacpipeError, NotLeader
from cluster.core.leadership import StoredEdit
from cluster.standby.other_coordinators import OtherCoordinators
from cluster.transport.rich_errors import abort
from cluster.v1 import leader_pb2 as pb
from cluster.v1.leader_pb2_grpc import LeaderServiceServicer

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class LeaderServicer(LeaderServiceServicer):
    """Serves LeaderService for one process. Only coordinators may call it, which the server's rules see to.

    ``replicator`` sends the state in ``home`` to those that follow, ``publish`` gives it what is new of that, and
    ``confirm`` says which of them have stored it. ``http`` answers the requests that they pass on. All are None while
    this process does not lead. Once ``leaving`` is set, the standbys pass these to the next leader.
    """

    def __init__(
        self,
        others: OtherCoordinators,
        home: Path,
        cluster: str,
        replicator: Replicator | None = None,
        http: ASGIApp | None = None,
        leaving: asyncio.Event | None = None,
        publish: Callable[[], Awaitable[None]] | None = None,
        confirm: Callable[[], Awaitable[StoredEdit]] | None = None,
    ) -> None:
        self._others, self._home, self._cluster = others, home, cluster
        self._replicator, self._http = replicator, http
        self._leaving = leaving or asyncio.Event()
        self._publish = publish
        self._confirm = confirm

    async def Follow(
        self, request_iterator: AsyncIterator[pb.FollowRequest], context: Context
    ) -> AsyncIterator[pb.FollowResponse]:
        if self._replicator is None:
            await abort(context, NotLeader("this coordinator stands by; follow the one that leads"))
        if self._publish:
            await self._publish()
        updates = serve_follow(self._replicator, self._home, self._cluster, request_iterator, context)
        async with aclosing(updates):
            async for update in updates:
                yield update

    async def Leads(self, request: pb.LeadsRequest, context: Context) -> pb.LeadsResponse:
        return encode_leads_response(self._others.hear(decode_claim(request)))

    async def StoreEdit(self, request: pb.StoreEditRequest, context: Context) -> pb.StoreEditResponse:
        if self._confirm is None:
            await abort(context, NotLeader("this coordinator stands by; ask the one that leads"))
        edited = request.file
        try:
            await anyio.to_thread.run_sync(adopt_edit, self._home, self._cluster, edited.name, edited.content)
        except MacpipeError as e:
            await abort(context, e)
        return encode_stored_edit(await self._confirm())

    async def PassHttp(  # type: ignore[override]  # the answer is written to the context
        self, request_iterator: AsyncIterator[pb.PassHttpRequest], context: Context
    ) -> None:
        if self._http is None:
            await abort(context, NotLeader("this coordinator stands by; ask the one that leads"))
        answering = asyncio.ensure_future(answer_passed(self._http, request_iterator, context, self._leaving))
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()  # first: what it reads from the aborted call would be an internal error
                await asyncio.gather(answering, return_exceptions=True)
                why = "this coordinator leads no more; the answer goes on at the next one"
                await abort(context, ConnectionLost(why))
            await answering
        finally:
            leaving.cancel()
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
