"""The watch: asks every worker how it is, all the time, and keeps what each said last.

It carries out what ``cluster.membership`` judges: heartbeats in, beliefs out. To the workers its asking is the sign
that their coordinator lives. It refuses to know what a plan is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable

from cluster.coordinator.roster import Member, Roster
from cluster.errors import MacpipeError, WorkerLost, WorkerRefused
from cluster.limits import GONE_S, HEARTBEAT_S
from cluster.membership.suspicion import Belief, Standing, Suspicion
from cluster.types import WorkerFacts

log = logging.getLogger(__name__)

LOOK_S = 0.1
Told = Callable[[Belief], None]


class Watch:
    """``told`` hears of every change of belief; ``alive`` names workers through whom a frame went a moment ago."""

    def __init__(self, roster: Roster, told: Told, alive: Callable[[], Collection[str]]) -> None:
        self._roster, self._told, self._alive = roster, told, alive
        self._suspicion = Suspicion()
        self._beats: dict[str, asyncio.Task[None]] = {}
        self._hurry: dict[str, asyncio.Event] = {}
        self._seen: dict[str, tuple[Member, float]] = {}
        """What was heard last, by name, and when."""
        self._news = asyncio.Event()
        self._look: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask; nothing happens where that has begun."""
        if self._look is None:
            self._look = asyncio.create_task(self._looking())

    async def close(self) -> None:
        tasks = [t for t in (self._look, *self._beats.values()) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def members(self) -> tuple[Member, ...]:
        """Every worker that was ever heard, by name, as it is believed to be."""
        return tuple(self._judged(name) for name in sorted(self._seen))

    def belief(self, worker: str) -> Belief | None:
        return self._suspicion.of(worker)

    def beliefs(self) -> tuple[Belief, ...]:
        return tuple(self._suspicion)

    async def everybody(self) -> tuple[Member, ...]:
        """Ask all who are not gone, and ``members`` once they have answered."""
        return await self.asked(tuple(self._seen), time.monotonic())

    def up_since(self, worker: str, when: float) -> bool:
        """Whether the worker has been up all the time since then."""
        belief = self._suspicion.of(worker)
        return belief is not None and belief.standing is Standing.UP and belief.since <= when

    def gone(self, worker: str) -> bool:
        return self._suspicion.gone(worker)

    def require(self, workers: Iterable[str], when: str) -> None:
        """Raises WorkerLost where one of these counts as gone; ``when`` ends its sentence."""
        for worker in workers:
            if self.gone(worker):
                raise WorkerLost(f"worker {worker} went {when}", worker=worker)

    async def asked(self, workers: Collection[str], since: float) -> tuple[Member, ...]:
        """Ask these now; ``members`` once each has answered after ``since`` or counts as gone.

        One whose engine has crashed counts as gone too, but it still answers, and may have a new one to tell of.
        """
        for hurry in self._hurry.values():
            hurry.set()
        while any(self._owes_a_word(w, since) for w in workers if w in self._seen):
            await self._news.wait()
        return self.members()

    def _owes_a_word(self, worker: str, since: float) -> bool:
        member, heard = self._seen[worker]
        return heard < since and (member.reachable or not self._suspicion.gone(worker))

    def _judged(self, name: str) -> Member:
        member = self._seen[name][0]
        belief = self._suspicion.of(name)
        if belief and belief.standing is Standing.GONE and not member.problem:
            return Member(member.facts, f"worker {name} {belief.why}", reachable=False)
        return member

    async def _looking(self) -> None:
        while True:
            self._attend()
            now = time.monotonic()
            for worker in self._alive():
                self._tell(self._suspicion.heard(worker, now) if not self._suspicion.gone(worker) else ())
            self._tell(self._suspicion.look(now))
            await asyncio.sleep(LOOK_S)

    def _attend(self) -> None:
        """Ask whoever is announced, and nobody else."""
        addresses = self._roster.addresses()
        for address in addresses - self._beats.keys():
            self._hurry[address] = asyncio.Event()
            self._beats[address] = asyncio.create_task(self._beat(address))
        for address in self._beats.keys() - addresses:
            self._beats.pop(address).cancel()
            del self._hurry[address]

    async def _beat(self, address: str) -> None:
        hurry = self._hurry[address]
        while True:
            hurry.clear()
            await self._ask(address)
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await hurry.wait()
            except TimeoutError:
                continue

    async def _ask(self, address: str) -> None:
        try:
            facts, problem = await self._roster.control(address).describe(GONE_S)
        except MacpipeError as e:
            self._failed(address, e)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            log.debug("the channel to %s was closed under a heartbeat", address)
        else:
            self._answered(facts, problem)

    def _answered(self, facts: WorkerFacts, problem: str) -> None:
        now = time.monotonic()
        self._wake()
        member = self._roster.member(facts, problem)
        self._seen[facts.name] = (member, now)
        if problem or not member.reachable:
            self._tell(self._suspicion.refused(facts.name, member.problem, now))
        else:
            self._tell(self._suspicion.heard(facts.name, now))

    def _failed(self, address: str, error: MacpipeError) -> None:
        """Only who lives at this address now is meant: a worker that was started again has another."""
        for name, (member, heard) in tuple(self._seen.items()):
            if member.facts.control_address == address:
                self._seen[name] = (Member(member.facts, error.sentence, reachable=False), heard)
                if isinstance(error, WorkerRefused):
                    self._tell(self._suspicion.refused(name, error.sentence, time.monotonic()))
        self._wake()

    def _wake(self) -> None:
        """Let those look again who wait for news."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _tell(self, beliefs: tuple[Belief, ...]) -> None:
        for belief in beliefs:
            self._wake()
            log.info("worker %s is %s: %s", belief.worker, belief.standing, belief.why or "heard")
            self._told(belief)
