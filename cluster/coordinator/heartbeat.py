"""The watch: asks every worker how it is, all the time, and keeps what each said last.

It carries out what ``cluster.membership`` judges: heartbeats in, beliefs out. To the workers its asking is the sign
that their coordinator lives. It refuses to know what a plan is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from cluster.coordinator.roster import Roster, RosterEntry
from cluster.coordinator.worker_table import WorkerTable
from cluster.core.errors import MacpipeError, WorkerLost, WorkerRefused
from cluster.core.limits import ASK_S, GONE_S, HEARTBEAT_S, MAX_PATIENCE, STATUS_ASK_S
from cluster.core.worker import WorkerInfo
from cluster.membership.slowness import extra_s
from cluster.membership.suspicion import Belief, Standing, Suspicion
from cluster.platform.overload import Lag, no_lag

log = logging.getLogger(__name__)

LOOK_S = 0.1
Told = Callable[[Belief], None]


class HeartbeatMonitor:
    """``told`` hears of every change of belief; ``alive`` names workers through whom a frame went a moment ago."""

    def __init__(self, roster: Roster, told: Told, alive: Callable[[], Collection[str]], lag: Lag = no_lag) -> None:
        self._roster, self._told, self._alive, self._lag = roster, told, alive, lag
        self._suspicion = Suspicion()
        self._table = WorkerTable(self.is_gone)
        self._beats: dict[str, asyncio.Task[None]] = {}
        self._hurry: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()
        self._look: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask; nothing happens where that has begun."""
        if self._look is None:
            self._look = asyncio.create_task(self._run())

    async def close(self) -> None:
        tasks = [t for t in (self._look, self._closing, *self._beats.values()) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def members(self) -> tuple[RosterEntry, ...]:
        """Every worker that is asked or left a short while ago, by name, as it is believed to be."""
        return tuple(self._entry_of(name) for name in self._table.names())

    def duplicates(self) -> tuple[RosterEntry, ...]:
        """Workers that answer under a name or an id that another living worker has."""
        return self._table.duplicates(time.monotonic())

    def belief(self, worker: str) -> Belief | None:
        return self._suspicion.of(worker)

    def beliefs(self) -> tuple[Belief, ...]:
        return tuple(self._suspicion)

    async def everybody(self) -> tuple[RosterEntry, ...]:
        """``members`` once all who are not gone have answered, or after ``STATUS_ASK_S``."""
        return await self.ask(self._table.names(), time.monotonic(), STATUS_ASK_S)

    def lag(self) -> float:
        """How late things happen on the slowest machine of the cluster, in seconds. Any thread may ask."""
        return max(self._lag(), self._suspicion.worst_lag())

    def up_since(self, worker: str, when: float) -> bool:
        """Whether the worker has been up all the time since then."""
        belief = self._suspicion.of(worker)
        return belief is not None and belief.standing is Standing.UP and belief.since <= when

    def is_gone(self, worker: str) -> bool:
        return self._suspicion.is_gone(worker)

    def require(self, workers: Iterable[str], when: str) -> None:
        """Raises WorkerLost where one of these counts as gone; ``when`` ends its sentence."""
        for worker in workers:
            if self.is_gone(worker):
                raise WorkerLost(f"worker {worker} went {when}", worker=worker)

    async def ask(
        self, workers: Collection[str], since: float, within_s: float | None = None
    ) -> tuple[RosterEntry, ...]:
        """Ask these now; ``members`` once each has answered after ``since`` or counts as gone, or after ``within_s``.

        By default that is ``ASK_S``. A worker that is not asked, since its announcement was withdrawn, is not waited
        for. One whose engine has crashed counts as gone, but is waited for: its daemon answers, and may have a new
        engine to tell of.
        """
        self._attend()
        for hurry in self._hurry.values():
            hurry.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_S if within_s is None else within_s):
                while any(self._table.owes_answer(w, since) for w in workers):
                    await self._news.wait()
        return self.members()

    def _entry_of(self, name: str) -> RosterEntry:
        entry = self._table.get(name)
        assert entry
        member = entry.member
        if member.problem:
            return member
        if not self._table.is_asked(name):
            return RosterEntry(member.facts, f"worker {name} has left: it is not announced any more", reachable=False)
        belief = self._suspicion.of(name)
        if belief and belief.standing is Standing.GONE:
            return RosterEntry(member.facts, f"worker {name} {belief.why}", reachable=False)
        return member

    async def _run(self) -> None:
        while True:
            self._attend()
            now = time.monotonic()
            for worker in self._alive():
                if self._suspicion.of(worker) and not self._suspicion.is_gone(worker):
                    self._tell(self._suspicion.on_heard(worker, now))
            self._tell(self._suspicion.look(now, self._lag()))
            await asyncio.sleep(LOOK_S)

    def _attend(self) -> None:
        """Ask whoever is announced or holds a stage, and nobody else; wake those who wait for one that has left."""
        addresses = self._roster.addresses()
        for address in addresses - self._beats.keys():
            self._hurry[address] = asyncio.Event()
            self._beats[address] = asyncio.create_task(self._beat(address))
        departed = self._beats.keys() - addresses
        for address in departed:
            self._beats.pop(address).cancel()
            del self._hurry[address]
        for name in self._table.ask_only(addresses, time.monotonic()):
            self._suspicion.forget(name)
        if departed:
            self._wake()
            if self._closing is None or self._closing.done():
                self._closing = asyncio.create_task(self._roster.forget_absent())

    async def _beat(self, address: str) -> None:
        hurry, patience_s = self._hurry[address], GONE_S
        while True:
            hurry.clear()
            patience_s = await self._ask(address, patience_s)
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await hurry.wait()
            except TimeoutError:
                continue

    async def _ask(self, address: str, patience_s: float) -> float:
        """Ask once, for so long; how long to ask next: after no answer longer, else a slow one would never arrive."""
        began = time.monotonic()
        patience_s = max(patience_s, GONE_S + extra_s(self._lag()))
        try:
            facts, problem = await self._roster.control(address).describe(patience_s)
        except MacpipeError as e:
            self._on_failure(address, e)
            if time.monotonic() - began >= patience_s:
                return min(2 * patience_s, MAX_PATIENCE * GONE_S)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            log.debug("the channel to %s was closed under a heartbeat", address)
        else:
            self._on_answer(address, facts, problem)
            return max(GONE_S, min(2 * (time.monotonic() - began), MAX_PATIENCE * GONE_S))
        return patience_s

    def _on_answer(self, address: str, facts: WorkerInfo, problem: str) -> None:
        now = time.monotonic()
        self._wake()
        member = self._roster.member(facts, problem)
        change = self._table.answered(address, member, now)
        for name in change.replaced:
            self._tell(self._suspicion.on_refusal(name, f"was replaced by {facts.name} at {address}", now))
        if not change.name:
            return
        if problem or not member.reachable:
            self._tell(self._suspicion.on_refusal(facts.name, member.problem, now))
        else:
            self._tell(self._suspicion.on_heard(facts.name, now))
        self._suspicion.note_lag(facts.name, facts.lag_s)

    def _on_failure(self, address: str, error: MacpipeError) -> None:
        """Only who lives at this address now is meant: a worker that was started again has another."""
        for name in self._table.failed(address, error.sentence):
            if isinstance(error, WorkerRefused):
                self._tell(self._suspicion.on_refusal(name, error.sentence, time.monotonic()))
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
