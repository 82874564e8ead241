"""Follow a leader: store what it sends in this Mac's replica, and tell it what is stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Final

import anyio.to_thread
import grpc

from cluster.codec.leadership import decode_leadership, encode_coordinator
from cluster.core.errors import DeadlineExceeded, MacpipeError, Unreachable
from cluster.core.futures import ignore_error
from cluster.core.journal_limits import JOURNAL_FSYNC_S
from cluster.core.leadership import CoordinatorName, LeadershipState
from cluster.core.limits import GONE_S, HEARTBEAT_S
from cluster.platform.continuous_clock import continuous_seconds
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.replica_folder import ReplicaFolder
from cluster.transport.grpc_setup import control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import leader_pb2 as pb
from cluster.v1.leader_pb2_grpc import LeaderServiceStub

__all__ = ["FollowStream"]

log = logging.getLogger(__name__)
_MOST_UNSENT: Final = 256
"""Most acknowledgements that wait for the connection."""


class FollowStream:
    """The stream of the leader at ``address`` to the standby ``me``, during an ``async with`` block.

    Entering raises ``MacpipeError`` if the leader cannot be followed.
    """

    def __init__(self, address: str, trust: Trust, me: CoordinatorName, replica: ReplicaFolder) -> None:
        self._address, self._me, self._replica = address, me, replica
        self._own_files = replica.own_files()
        """Their edits are told to the leader; all of them at first, since the leader before may not have got one."""
        self._channel = control_channel(trust, address, COORDINATOR)
        self.heard_at = continuous_seconds()
        """When the leader was heard last, in seconds of the continuous clock."""
        self.leadership: LeadershipState | None = None
        """What it said last of itself and its standbys."""
        self.ended = asyncio.Event()
        """Set once the stream has ended, for whatever reason."""
        self.handover: str | None = None
        """Which standby shall lead, once the leader said that it stops; "" if any may. None if it did not say so."""
        self.error: MacpipeError | None = None
        """Why the stream ended; None while it lasts."""
        self._tasks: list[asyncio.Task[None]] = []
        self._requests = asyncio.Queue[pb.FollowRequest | None](_MOST_UNSENT)
        self._is_unsynced = False
        self._told_prepared = False
        """What the leader believes of this standby, at first of each."""

    async def __aenter__(self) -> FollowStream:
        hello = pb.FollowHello(standby=encode_coordinator(self._me), term=self._replica.term, replica=self._replica.id)
        self._requests.put_nowait(pb.FollowRequest(hello=hello))
        updates = aiter(LeaderServiceStub(self._channel).Follow(self._send()))
        try:
            async with asyncio.timeout(GONE_S):
                first = await anext(updates, None)
            if first is None:
                raise Unreachable(f"the coordinator at {self._address} ended the stream at once")
            self._replica.begin(first)
            await self._store(first)
        except BaseException as e:
            await self._close()
            if isinstance(e, (grpc.aio.AioRpcError, TimeoutError)):
                raise self._error_of(e) from e
            raise
        self._tasks = [asyncio.create_task(self._run(updates)), asyncio.create_task(self._send_edits())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close()
        self.ended.set()

    def tell_prepared(self, *, is_prepared: bool) -> None:
        """Tell the leader whether this standby has read what it needs to lead, unless it knows. Call it each beat."""
        if is_prepared != self._told_prepared and not self._requests.full():
            self._requests.put_nowait(pb.FollowRequest(prepared=is_prepared))
            self._told_prepared = is_prepared

    async def _send(self) -> AsyncIterator[pb.FollowRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _close(self) -> None:
        """Close the channel. gRPC's task that sends would wait for requests for ever, also once the call has ended."""
        while not self._requests.empty():
            self._requests.get_nowait()
        self._requests.put_nowait(None)
        await self._channel.close(None)

    async def _run(self, updates: AsyncIterator[pb.FollowResponse]) -> None:
        try:
            async for update in updates:
                await self._store(update)
            self.error = Unreachable(f"the leader at {self._address} ended the stream")
        except grpc.aio.AioRpcError as e:
            self.error = self._error_of(e)
        except MacpipeError as e:  # this Mac's disk, or an old leader
            self.error = e
        except Exception as e:  # top of the task
            self.error = MacpipeError(f"the standby failed: {type(e).__name__}: {e}")
            log.exception("standby: update not stored")
        finally:
            self.ended.set()
            await self._close()  # the leader need not wait for this standby

    async def _store(self, update: pb.FollowResponse) -> None:
        self.heard_at = continuous_seconds()
        match update.WhichOneof("update"):
            case "records":  # into the page cache, which takes no longer than a thread
                self._replica.apply(update)
                self._is_unsynced = True
            case "beat":
                pass
            case "stopping":
                self.handover = update.stopping.handover
            case kind:
                await self._apply(update)
                if kind == "leadership":
                    self.leadership = decode_leadership(update.leadership)
        await self._requests.put(pb.FollowRequest(stored=update.number))

    async def _apply(self, update: pb.FollowResponse) -> None:
        """Apply an update in a thread, to its end also if cancelled: the next stream writes to the same replica."""
        applying = asyncio.ensure_future(anyio.to_thread.run_sync(self._replica.apply, update))
        applying.add_done_callback(ignore_error)
        try:
            await asyncio.shield(applying)
        except asyncio.CancelledError:
            await asyncio.wait((applying,))
            raise

    async def _send_edits(self) -> None:
        """Sync the journal now and then, and tell the leader what somebody edited on this Mac."""
        while True:
            await asyncio.sleep(max(JOURNAL_FSYNC_S, HEARTBEAT_S))
            if self._is_unsynced:
                self._is_unsynced = False
                await anyio.to_thread.run_sync(self._replica.sync)
            if not self._replica.is_complete:
                continue
            for name, content in (await anyio.to_thread.run_sync(self._own_files.read_changed)).items():
                if content is not None and self._replica.may_edit(name):
                    await self._requests.put(pb.FollowRequest(file=pb.ReplicatedFile(name=name, content=content)))

    def _error_of(self, error: grpc.aio.AioRpcError | TimeoutError) -> MacpipeError:
        if isinstance(error, TimeoutError):
            return Unreachable(f"the coordinator at {self._address} does not answer")
        found = from_rpc_error(error, self._address, peer="leader")
        return Unreachable(found.sentence) if isinstance(found, DeadlineExceeded) else found
