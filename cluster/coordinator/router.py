"""Send the requests of one model to its replicas, and move them from a replica that is lost to the others.

Each replica's own loop makes an offer for a request, so an offer is exact: it knows the prefixes that are kept, and
every request that came before. This costs a short job on each loop, and needs no copy of what they keep.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from cluster.coordinator.active_requests import MovedRequest
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.replica import Replica
from cluster.core.cluster_state import ServingState
from cluster.core.errors import MacpipeError, NotServing
from cluster.core.futures import ignore_error
from cluster.core.limits import CONTROL_TIMEOUT_S
from cluster.core.request import Request
from cluster.scheduler.routing import Offer, choose_replica

log = logging.getLogger(__name__)

OFFER_S: Final = 0.25
"""A loop that makes no offer within this time is stuck: it gets no request until it does."""
_BY_READINESS: Final = (ServingState.SERVING, ServingState.RECOVERING, ServingState.FAILED)


class Router:
    """Routes the requests of one model. ``replicas`` returns its replicas.

    All methods must be called on one event loop.
    """

    def __init__(self, replicas: Callable[[], Sequence[Replica]]) -> None:
        self._replicas = replicas
        self._routing = asyncio.Lock()
        """Held from the offers for a request until it is sent, so that the next offers know of it."""
        self._moving = asyncio.Lock()
        self._late: dict[EngineLoop, asyncio.Future[Offer]] = {}
        """The offers that did not come in time. A loop that is stuck for good never makes its own."""

    def ready(self, without: Replica | None = None) -> list[Replica]:
        """Return the replicas that serve; if none does, those that recover, else those that failed to."""
        others = [replica for replica in self._replicas() if replica is not without]
        groups = ([replica for replica in others if replica.state is state] for state in _BY_READINESS)
        return next((group for group in groups if group), [])

    def least_loaded(self) -> Replica:
        """Return the ready replica with the fewest live requests. Raises ``NotServing`` if there is none."""
        ready = self.ready()
        if not ready:
            raise NotServing("no model is loaded")
        return min(ready, key=lambda replica: replica.live)

    async def submit(self, request: Request) -> AnswerQueue:
        """Queue a request at the replica that is best for it. Raises as ``Replica.submit``."""
        if len(self.ready()) < 2:
            return self.least_loaded().submit(request)
        async with self._routing:
            chosen = await self._choose(self.ready(), request)
            return chosen.submit(request)

    async def _choose(self, replicas: Sequence[Replica], request: Request) -> Replica:
        """Return the best of some replicas for a request; the least loaded one of those that make no offer."""
        offers = await self._gather_offers(replicas, request)
        ready = self.ready()
        offering = [replica for replica in replicas if replica in offers and replica in ready]
        if not offering:
            return min(ready or replicas, key=lambda replica: replica.live)
        return offering[choose_replica([offers[replica] for replica in offering])]

    async def _gather_offers(self, replicas: Sequence[Replica], request: Request) -> dict[Replica, Offer]:
        loops = {replica: replica.service.loop for replica in self._replicas() if replica.service}
        self._late = {loop: late for loop, late in self._late.items() if not late.done() and loop in loops.values()}
        asked = {
            replica: asyncio.wrap_future(loops[replica].make_offer(request))
            for replica in replicas
            if replica in loops and loops[replica] not in self._late
        }
        if not asked:
            return {}
        await asyncio.wait(asked.values(), timeout=OFFER_S)
        for replica, offer in asked.items():
            if not offer.done():
                log.warning("router: no offer in time holder=%s", replica.holder)
                offer.add_done_callback(ignore_error)
                self._late[loops[replica]] = offer
        return {r: offer.result() for r, offer in asked.items() if offer.done() and not offer.exception()}

    # Moves

    async def wait_moved(self) -> None:
        """Wait until no request is between two replicas, or for ``CONTROL_TIMEOUT_S``."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S), self._moving:
                return
        except TimeoutError:
            log.warning("router: requests still move")

    async def move_requests(self, source: Replica) -> None:
        """Move all requests of a replica to others that serve. Those that none of them can answer stay.

        Do not cancel it: a request may be between two replicas.
        """
        async with self._moving:
            service = source.service
            if service is None or not self.serves_without(source):
                return
            try:
                moved = await asyncio.wrap_future(service.loop.hand_over())
            except NotServing:  # its loop has ended, and with it all of its requests
                return
            for one in moved:
                await self._place(one, source)
            if moved:
                log.info("router: requests moved holder=%s requests=%d", source.holder, len(moved))

    def serves_without(self, source: Replica) -> bool:
        """Return whether another replica than ``source`` serves."""
        return bool(self._serving_without(source))

    def _serving_without(self, source: Replica) -> list[Replica]:
        return [replica for replica in self.ready(source) if replica.state is ServingState.SERVING]

    async def _place(self, moved: MovedRequest, source: Replica) -> None:
        """Give a request to the best replica that can answer it, else back to ``source``."""
        tried: list[Replica] = []
        while left := [replica for replica in self._serving_without(source) if replica not in tried]:
            async with self._routing:
                target = await self._choose(left, moved.request)
                tried.append(target)
                if await self._give(moved, target):
                    return
        if not await self._give(moved, source):
            moved.answer.fail(NotServing("the model is no longer served; send the request again"))

    async def _give(self, moved: MovedRequest, replica: Replica) -> bool:
        """Let a replica go on with a request. Return whether it does."""
        service = replica.service
        if service is None:
            return False
        service.adopt_answer(moved.request, moved.answer)
        try:
            refused = await asyncio.wrap_future(service.loop.take_over([moved]))
        except MacpipeError:  # its loop has ended
            return False
        if moved.answer.abandoned:
            moved.answer.abandon()
        return not refused
