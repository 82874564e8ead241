"""Send heartbeats to every worker and keep the last answer of each.

Feeds answers to ``cluster.membership`` and reports its beliefs. The workers take a heartbeat as the sign that their
coordinator is alive. This module refuses to know what a plan is.
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
OnChange = Callable[[Belief], None]


class HeartbeatMonitor:
    """Heartbeats of all workers.

    ``on_change`` is called with every changed belief. ``alive`` returns the workers that a frame passed a moment ago.
    """

    def __init__(
        self, roster: Roster, on_change: OnChange, alive: Callable[[], Collection[str]], lag: Lag = no_lag
    ) -> None:
        self._roster, self._on_change, self._alive, self._lag = roster, on_change, alive, lag
        self._suspicion = Suspicion()
        self._table = WorkerTable(self.is_gone)
        self._beats: dict[str, asyncio.Task[None]] = {}
        self._ask_now: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start sending heartbeats. Do nothing if already started."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())

    async def close(self) -> None:
        tasks = [t for t in (self._loop_task, self._closing, *self._beats.values()) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def members(self) -> tuple[RosterEntry, ...]:
        """Return every worker that is asked, left recently or was lost, sorted by name, with its believed state."""
        found = (*map(self._entry_of, self._table.names()), *self._lost())
        return tuple(sorted(found, key=lambda entry: entry.info.name))

    def _lost(self) -> tuple[RosterEntry, ...]:
        """Return the workers that were lost with the leader before. Those that answer are in the table instead."""
        return tuple(entry for entry in self._roster.lost() if entry.info.name not in self._table)

    def duplicates(self) -> tuple[RosterEntry, ...]:
        """Return the workers that use the name or the id of another living worker."""
        return self._table.duplicates(time.monotonic())

    def belief(self, worker: str) -> Belief | None:
        return self._suspicion.of(worker)

    def beliefs(self) -> tuple[Belief, ...]:
        since = self._roster.lost_since
        lost = (Belief(entry.info.name, Standing.GONE, since, since, entry.problem) for entry in self._lost())
        return (*self._suspicion, *lost)

    async def wait_for_answers(self) -> tuple[RosterEntry, ...]:
        """Return ``members`` once all workers that are not gone have answered, or after ``STATUS_ASK_S``."""
        return await self.ask(self._table.names(), time.monotonic(), STATUS_ASK_S)

    def lag(self) -> float:
        """Return the scheduling lag of the slowest machine in the cluster, in seconds. Thread-safe."""
        return max(self._lag(), self._suspicion.worst_lag())

    def up_since(self, worker: str, when: float) -> bool:
        """Return whether the worker has been up without a break since ``when`` (monotonic seconds)."""
        belief = self._suspicion.of(worker)
        return belief is not None and belief.standing is Standing.UP and belief.since <= when

    def is_gone(self, worker: str) -> bool:
        return self._suspicion.is_gone(worker)

    def require(self, workers: Iterable[str], when: str) -> None:
        """Raise ``WorkerLost`` if one of ``workers`` counts as gone; ``when`` ends its sentence."""
        for worker in workers:
            if self.is_gone(worker):
                raise WorkerLost(f"worker {worker} was lost {when}", worker=worker)

    async def ask(
        self, workers: Collection[str], since: float, within_s: float | None = None
    ) -> tuple[RosterEntry, ...]:
        """Ask all workers now. Return ``members`` once each of ``workers`` has answered after ``since`` or is gone.

        Return after ``within_s`` seconds at the latest; None means ``ASK_S``. Do not wait for a worker whose
        announcement was withdrawn, since it is not asked. Do wait for a worker whose engine crashed, although it counts
        as gone: its daemon still answers and may report a new engine.
        """
        self._update_asked()
        for ask_now in self._ask_now.values():
            ask_now.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_S if within_s is None else within_s):
                while any(self._table.owes_answer(w, since) for w in workers):
                    await self._changed.wait()
        return self.members()

    def _entry_of(self, name: str) -> RosterEntry:
        entry = self._table.get(name)
        assert entry
        member = entry.member
        if member.problem:
            return member
        if not self._table.is_asked(name):
            return RosterEntry(member.info, f"worker {name} has left: it is no longer announced", reachable=False)
        belief = self._suspicion.of(name)
        if belief and belief.standing is Standing.GONE:
            return RosterEntry(member.info, f"worker {name} {belief.why}", reachable=False)
        return member

    async def _run(self) -> None:
        while True:
            self._update_asked()
            now = time.monotonic()
            for worker in self._alive():
                if self._suspicion.of(worker) and not self._suspicion.is_gone(worker):
                    self._report(self._suspicion.on_heard(worker, now))
            self._report(self._suspicion.judge_silence(now, self._lag()))
            await asyncio.sleep(LOOK_S)

    def _update_asked(self) -> None:
        """Ask exactly the workers that are announced or hold a stage. Wake those who wait for a worker that left."""
        addresses = self._roster.addresses()
        for address in addresses - self._beats.keys():
            self._ask_now[address] = asyncio.Event()
            self._beats[address] = asyncio.create_task(self._beat(address))
        departed = self._beats.keys() - addresses
        for address in departed:
            self._beats.pop(address).cancel()
            del self._ask_now[address]
        for name in self._table.ask_only(addresses, time.monotonic()):
            self._suspicion.forget(name)
        if departed:
            self._wake()
            if self._closing is None or self._closing.done():
                self._closing = asyncio.create_task(self._roster.forget_absent())

    async def _beat(self, address: str) -> None:
        ask_now = self._ask_now[address]
        timeout_s = GONE_S
        while True:
            ask_now.clear()
            timeout_s = await self._ask(address, timeout_s)
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await ask_now.wait()
            except TimeoutError:
                continue

    async def _ask(self, address: str, timeout_s: float) -> float:
        """Ask once. Return the timeout of the next ask: longer after a timeout, or a slow worker could never answer."""
        began = time.monotonic()
        timeout_s = max(timeout_s, GONE_S + extra_s(self._lag()))
        try:
            info, problem = await self._roster.control(address).describe(timeout_s)
        except MacpipeError as e:
            self._on_failure(address, e)
            if time.monotonic() - began >= timeout_s:
                return min(2 * timeout_s, MAX_PATIENCE * GONE_S)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            log.debug("heartbeat: channel closed during a call address=%s", address)
        else:
            self._on_answer(address, info, problem)
            return max(GONE_S, min(2 * (time.monotonic() - began), MAX_PATIENCE * GONE_S))
        return timeout_s

    def _on_answer(self, address: str, info: WorkerInfo, problem: str) -> None:
        now = time.monotonic()
        self._wake()
        member = self._roster.member(info, problem)
        change = self._table.enter_answer(address, member, now)
        for name in change.replaced:
            self._report(self._suspicion.on_refusal(name, f"was replaced by {info.name} at {address}", now))
        if not change.name:
            return
        if problem or not member.reachable:
            self._report(self._suspicion.on_refusal(info.name, member.problem, now))
        else:
            self._report(self._suspicion.on_heard(info.name, now))
        self._suspicion.note_lag(info.name, info.lag_seconds)

    def _on_failure(self, address: str, error: MacpipeError) -> None:
        """Handle that nobody answered at ``address``. A worker that restarted at another address is not affected."""
        for name in self._table.mark_unreachable(address, error.sentence):
            if isinstance(error, WorkerRefused):
                self._report(self._suspicion.on_refusal(name, error.sentence, time.monotonic()))
        self._wake()

    def _wake(self) -> None:
        """Wake the callers of ``ask``, so that they check again."""
        changed = self._changed
        self._changed = asyncio.Event()
        changed.set()

    def _report(self, beliefs: tuple[Belief, ...]) -> None:
        for belief in beliefs:
            self._wake()
            log.info(
                "heartbeat: belief changed reason=%s worker=%s standing=%s",
                belief.why or "heard",
                belief.worker,
                belief.standing,
            )
            self._on_change(belief)
