"""Hold the term by which this process leads its workers: take it before a load, raise it if a worker has gone on.

The rules are those of ``cluster.membership``; this module sends their calls. Heartbeats renew the leases of workers
that hold or load a slice. With standbys, ``renew`` keeps the others too, so that no standby leads on them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from cluster.core.errors import MacpipeError, NotLeader, StaleTerm, WorkerTaken
from cluster.core.limits import GONE_S, HEARTBEAT_S, MAX_ROSTER
from cluster.core.term_limits import FENCE_S, GRANT_TRIES
from cluster.membership.candidacy import LeaderCandidate
from cluster.membership.in_sync import NOT_NAMED
from cluster.membership.leadership import Leadership
from cluster.membership.terms import Denial, Process, TermAnswer, TermCall, TermRequest
from cluster.platform.continuous_clock import continuous_seconds

__all__ = ["TermHolder", "TermWorker"]


class TermWorker(Protocol):
    """A worker's client, as far as terms are concerned."""

    address: str
    name: str

    async def request_term(self, call: TermCall) -> tuple[TermAnswer, str]:
        """Send a call. Return the answer, and why not, for people. Raises ``WorkerLost``, and the worker's error."""


class TermHolder:
    """The present term of one process; its ``number`` is 0 before the first."""

    def __init__(
        self,
        process: Process,
        clock: Callable[[], float] = continuous_seconds,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.process = process
        self.in_sync = NOT_NAMED
        """The latest set of copies in sync that any worker named, this process's own sets included."""
        self._clock, self._draw = clock, draw
        self._leadership: Leadership | None = None
        self._led: dict[str, TermWorker] = {}
        """The workers that granted a term so far, by address."""
        self._problem = ""
        """Why a worker refused last."""
        self._taking = asyncio.Lock()
        self._ended = False
        """Whether everything was given back."""
        self._asking: dict[str, asyncio.Task[None]] = {}
        """What ``renew`` waits for, by the workers' addresses."""

    @property
    def number(self) -> int:
        return self._leadership.term.number if self._leadership else 0

    @property
    def led(self) -> tuple[str, ...]:
        """The addresses of the workers that have granted the present term, as far as they answered."""
        return tuple(sorted(self._leadership.workers)) if self._leadership else ()

    def begin(self, leadership: Leadership, workers: Sequence[TermWorker]) -> None:
        """Go on with the term that an election took. These workers granted it."""
        self._leadership = self._without_goal(leadership)
        self._remember({worker.address: worker for worker in workers})

    def _without_goal(self, leadership: Leadership) -> Leadership:
        """Return the same leadership without a ring that it must hold: a ring that is lost here is recovered."""
        return Leadership(leadership.term, leadership.grants, lambda workers: True, self._clock)

    async def take(self, workers: Sequence[TermWorker]) -> None:
        """Return once all these workers have granted this process one term, renewed just now.

        A higher term is taken only if one of them has granted another process one: it interrupts every ring. Raises
        ``WorkerTaken`` if another coordinator holds one, ``StaleTerm`` if one refuses for another reason, ``NotLeader``
        after ``give_back``, and the errors of ``TermWorker``.
        """
        async with self._taking:
            if self._ended:
                raise NotLeader("this coordinator has given its workers to another one")
            by_address = {worker.address: worker for worker in workers}
            if not await self._keep(by_address):
                await self._raise(by_address)
                await self._rejoin(by_address.keys())
            self._remember(by_address)

    def _remember(self, workers: Mapping[str, TermWorker]) -> None:
        """Note who is led. Addresses that were not loaded for the longest time are forgotten first."""
        others = [(address, worker) for address, worker in self._led.items() if address not in workers]
        self._led = dict([*others, *workers.items()][-MAX_ROSTER:])
        if self._leadership:
            self._leadership.retain(self._led)

    async def _keep(self, workers: Mapping[str, TermWorker]) -> bool:
        """Renew the present term, and have further workers join it. Return False if one of them is beyond it."""
        leadership = self._leadership
        if leadership is None:
            return False
        now = self._clock()
        calls = [TermCall(TermRequest.GRANT, address, leadership.term, now) for address in workers]
        for answer in await self._send_all(calls, workers):
            leadership.on_answer(answer)
        return workers.keys() <= leadership.workers

    async def _raise(self, workers: Mapping[str, TermWorker]) -> None:
        """Take a term that is higher than those of all these workers, in their present state."""
        for _ in range(GRANT_TRIES):
            candidate = LeaderCandidate(
                self.process, workers.keys(), lambda found: found >= workers.keys(), self._clock, self._draw
            )
            calls = candidate.step()
            while calls:
                answers = await self._send_all(calls, workers)
                calls = [following for answer in answers for following in candidate.on_answer(answer)]
            if candidate.leadership:
                self._leadership = self._without_goal(candidate.leadership)
                return
            await asyncio.sleep(self._draw() * HEARTBEAT_S)
        raise StaleTerm(f"{self._problem}; try again")

    async def _rejoin(self, taken: Collection[str]) -> None:
        """Raise the term at the other workers, too, so that heartbeats keep them. Those that do not answer are left."""
        self._led = {address: worker for address, worker in self._led.items() if address not in taken}
        leadership = self._leadership
        assert leadership
        now, joining = self._clock(), self._led
        calls = [TermCall(TermRequest.GRANT, address, leadership.term, now) for address in joining]
        with suppress(TimeoutError):
            async with asyncio.timeout(GONE_S):
                await asyncio.gather(
                    *(self._send(call, joining[call.worker]) for call in calls), return_exceptions=True
                )

    # Beside standbys

    async def renew(self, workers: Sequence[TermWorker]) -> None:
        """Renew the leases of all led workers, and have those of ``workers`` join that would. Call it each heartbeat.

        Returns at once: answers are awaited by tasks of their own, one for each worker at a time.
        """
        leadership = self._leadership
        if leadership is None or self._taking.locked():
            return
        known = {**self._led, **{worker.address: worker for worker in workers}}
        for call in leadership.step(known.keys()):
            if call.worker in known and call.worker not in self._asking:
                task = asyncio.create_task(self._converse(call, known[call.worker], leadership))
                self._asking[call.worker] = task
                task.add_done_callback(partial(self._forget_call, call.worker))

    def _forget_call(self, worker: str, _: asyncio.Task[None]) -> None:
        del self._asking[worker]

    async def _converse(self, call: TermCall, worker: TermWorker, leadership: Leadership) -> None:
        """Send a call and those that follow from its answer. A worker that does not answer is asked again later."""
        calls = [call]
        with suppress(MacpipeError, TimeoutError):
            async with asyncio.timeout(GONE_S + FENCE_S):
                while calls and self._leadership is leadership:
                    answer, _ = await worker.request_term(calls.pop())
                    self.in_sync = max(self.in_sync, answer.in_sync)
                    calls += leadership.on_answer(answer)
                    if call.worker in leadership.workers:
                        self._led[worker.address] = worker  # it may have been forgotten and found again

    async def give_back(self) -> None:
        """End the leases of all led workers, and take no term any more. They refuse this process's calls from now on.

        What they hold stays there for the next leader. Wait at most ``GONE_S``.
        """
        self._ended = True
        leadership, self._leadership = self._leadership, None
        if leadership is None:
            return
        led, self._led = self._led, {}
        with suppress(TimeoutError):
            async with asyncio.timeout(GONE_S):
                calls = [call for call in leadership.step_down() if call.worker in led]
                await asyncio.gather(*(self._send(call, led[call.worker]) for call in calls), return_exceptions=True)

    async def _send_all(self, calls: Sequence[TermCall], workers: Mapping[str, TermWorker]) -> list[TermAnswer]:
        """Send calls at once and return the answers. Raises the first error, once all have been answered."""
        found = await asyncio.gather(
            *(self._send(call, workers[call.worker]) for call in calls), return_exceptions=True
        )
        answers = [answer for answer in found if isinstance(answer, TermAnswer)]
        if errors := [error for error in found if isinstance(error, BaseException)]:
            taken = [a.call for a in answers if not a.denial and a.call.request is TermRequest.GRANT]
            new = [call for call in taken if call.worker not in self._led]
            returns = [TermCall(TermRequest.RETURN, call.worker, call.term, call.sent_at) for call in new]
            await asyncio.gather(*(self._send(call, workers[call.worker]) for call in returns), return_exceptions=True)
            raise errors[0]
        return answers

    async def _send(self, call: TermCall, worker: TermWorker) -> TermAnswer:
        answer, problem = await worker.request_term(call)
        self.in_sync = max(self.in_sync, answer.in_sync)
        if problem:
            self._problem = f"worker {worker.name}: {problem}"
        if answer.denial is Denial.LEASED:
            raise WorkerTaken(f"worker {worker.name}: {problem}", worker=worker.name)
        return answer
