"""Serve one call of LeaderService/Follow: a standby's stream of updates, and its acknowledgements."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import anyio.to_thread
import grpc

from cluster.codec.leadership import decode_coordinator
from cluster.coordinator.follower import Follower
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.state_files import adopt_edit
from cluster.core.errors import DeadlineExceeded, InvalidRequest, MacpipeError
from cluster.core.limits import GONE_S, MAX_FACT_CHARS
from cluster.transport.rich_errors import abort
from cluster.v1 import leader_pb2 as pb

__all__ = ["serve_follow"]

log = logging.getLogger(__name__)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_MAX_ADDRESSES: Final = 8


async def serve_follow(
    replicator: Replicator, home: Path, cluster: str, requests: AsyncIterator[pb.FollowRequest], context: Context
) -> AsyncGenerator[pb.FollowResponse, None]:
    """Yield the updates of a standby that ``requests`` introduces, until it leaves or the leader stops.

    What it gets first is what was published last.
    """
    try:
        follower = await _introduce(replicator, requests)
    except MacpipeError as e:
        await abort(context, e)
    reading = asyncio.create_task(_read(replicator, follower, home, cluster, requests))
    try:
        async for update in follower.updates():
            yield update
    except MacpipeError as e:
        await abort(context, e)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        replicator.leave(follower)


async def _introduce(replicator: Replicator, requests: AsyncIterator[pb.FollowRequest]) -> Follower:
    try:
        async with asyncio.timeout(GONE_S):
            first = await anext(requests, pb.FollowRequest())
    except TimeoutError:
        raise DeadlineExceeded("a standby did not introduce itself") from None
    hello = first.hello
    texts = (hello.standby.name, hello.standby.instance, hello.replica, *hello.standby.addresses, *hello.standby.http)
    if not all(0 < len(text) <= MAX_FACT_CHARS and text.isprintable() for text in texts):
        raise InvalidRequest("a standby has a name, a process and a replica", field="hello")
    if len(hello.standby.addresses) > _MAX_ADDRESSES or len(hello.standby.http) > _MAX_ADDRESSES:
        raise InvalidRequest(f"a standby has at most {_MAX_ADDRESSES} addresses", field="hello")
    return replicator.follow(decode_coordinator(hello.standby), hello.replica)


async def _read(
    replicator: Replicator, follower: Follower, home: Path, cluster: str, requests: AsyncIterator[pb.FollowRequest]
) -> None:
    """Take what the standby has stored, whether it can lead at once, and what was edited on its Mac."""
    try:
        async for request in requests:
            match request.WhichOneof("part"):
                case "stored":
                    replicator.acknowledge(follower, request.stored)
                case "prepared":
                    replicator.note_prepared(follower, is_prepared=request.prepared)
                case "file":
                    await _adopt(home, cluster, request.file)
    finally:
        follower.close()


async def _adopt(home: Path, cluster: str, file: pb.ReplicatedFile) -> None:
    try:
        await anyio.to_thread.run_sync(adopt_edit, home, cluster, file.name, file.content)
    except MacpipeError as e:
        log.error("replication: edit of a standby not stored reason=%s file=%s", e.sentence, file.name)
