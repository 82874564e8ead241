"""Run seeds on Macs with a leader and a standby: send requests with ``AsyncClient``, strike, and check the history."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import anyio
import anyio.to_thread

from cluster.client import AsyncClient
from cluster.core.errors import MacpipeError
from faults.campaign import quantiles
from faults.checker import SLACK_S, Verdict, check
from faults.coordinator_fleet import CLUSTER, CoordinatorFleet
from faults.coordinator_scenario import CoordinatorScenario, Sort, Strike, questions
from faults.history import History

DEADLINE_S = 90.0


@dataclass
class CoordinatorOutcome:
    """A seed's verdict. ``ended``: answers that a typed error ended where two faults may cost an answer.

    ``resume_ms``: from the first strike to the first answer's next token; None if there was none.
    """

    scenario: CoordinatorScenario
    verdict: Verdict
    ended: int
    resume_ms: float | None
    history: History

    @property
    def kept(self) -> bool:
        return self.verdict.kept

    def complaint(self, folder: Path) -> str:
        """Return the report of a failed seed; its history is stored in ``folder``."""
        path = folder / f"coordinators-{self.scenario.seed}.jsonl"
        self.history.save(path)
        strikes = "; ".join(e["what"] for e in self.history.of("fault"))
        v = self.verdict
        return f"seed {self.scenario.seed} ({strikes}): {[*v.lost, *v.hung, *v.differing]}; history in {path}"


@dataclass
class CoordinatorSummary:
    """The output of ``ops/chaos --coordinators``."""

    seeds: int = 0
    requests: int = 0
    lost: int = 0
    hung: int = 0
    differing: int = 0
    ended: int = 0
    failed: list[int] = field(default_factory=list)
    resume: list[float] = field(default_factory=list)

    def add(self, outcome: CoordinatorOutcome) -> None:
        v = outcome.verdict
        self.seeds += 1
        self.requests += v.requests
        self.lost += len(v.lost)
        self.hung += len(v.hung)
        self.differing += len(v.differing)
        self.ended += outcome.ended
        self.failed += [] if outcome.kept else [outcome.scenario.seed]
        self.resume += [] if outcome.resume_ms is None else [outcome.resume_ms]

    def facts(self) -> dict[str, object]:
        return {
            "seeds": self.seeds,
            "requests": self.requests,
            "lost": self.lost,
            "hung": self.hung,
            "differing": self.differing,
            "ended_by_two_faults": self.ended,
            "resume_ms": quantiles(self.resume),
            "failed_seeds": sorted(self.failed),
        }


class CoordinatorCampaign:
    """``expected`` tokens are asked of the undisturbed Macs first; those of a sampled answer are not known."""

    def __init__(self, fleet: CoordinatorFleet) -> None:
        self.fleet, self.questions = fleet, questions()
        self.expected = anyio.run(self._ask_all)

    async def _ask_all(self) -> list[tuple[int, ...]]:
        async with AsyncClient(self.fleet.addresses, cluster=CLUSTER, timeout_s=60) as client:
            return [(await client.generate(list(q.prompt), **q.options)).tokens for q in self.questions]

    def play(self, scenario: CoordinatorScenario) -> CoordinatorOutcome:
        """Mend the fleet, then run the scenario."""
        self.fleet.mend()
        run = _Run(self, scenario)
        anyio.run(run.play)
        return run.judge()


class _Run:
    def __init__(self, campaign: CoordinatorCampaign, scenario: CoordinatorScenario) -> None:
        self._campaign, self._fleet, self._scenario = campaign, campaign.fleet, scenario
        self._history, self._began = History(), threading.Event()

    async def play(self) -> None:
        self._history.note("seed", seed=self._scenario.seed, leader=self._fleet.leader.name)
        with anyio.move_on_after(DEADLINE_S + 2 * SLACK_S):
            async with anyio.create_task_group() as tasks:
                for strike in self._scenario.strikes:
                    tasks.start_soon(anyio.to_thread.run_sync, self._strike, strike)
                async with anyio.create_task_group() as requests:
                    for number in range(len(self._scenario.requests)):
                        requests.start_soon(self._request, number)
                self._began.set()  # an answer that was too short is struck at its end

    async def _request(self, number: int) -> None:
        question = self._campaign.questions[self._scenario.requests[number]]
        name = self._name(number)
        self._history.note("sent", request=name)
        try:
            async with AsyncClient(self._fleet.addresses, cluster=CLUSTER, timeout_s=DEADLINE_S) as client:
                stream = client.stream(list(question.prompt), request_id=name, **question.options)
                await stream.wait_accepted()
                self._history.note("accepted", request=name)
                async for token in stream:
                    self._history.note("token", request=name, index=token.index, token=token.token)
                    if number == 0 and token.index >= self._scenario.token:
                        self._began.set()
                self._history.note("finish", request=name)
        except MacpipeError as e:
            self._history.note("error", request=name, reason=e.reason, sentence=e.sentence)
        if number == 0:
            self._began.set()

    def _strike(self, strike: Strike) -> None:
        self._began.wait(DEADLINE_S)
        time.sleep(strike.after_s)
        mac, words = self._fleet.strike(strike.target, strike.blow, self._scenario.seed)
        self._history.note("fault", what=words)
        if strike.back_s is not None:
            time.sleep(strike.back_s)
            self._fleet.bring_back(mac)
            self._history.note("back", what=words)

    def _name(self, number: int) -> str:
        return f"c{self._scenario.seed}-{number}-{id(self):x}"

    def judge(self) -> CoordinatorOutcome:
        verdict = check(self._history, self._expected_by_name(), DEADLINE_S)
        ended = 0
        if not self._scenario.keeps_all:
            typed = [one for one in verdict.lost if "without a type" not in one]
            ended, verdict.lost = len(typed), [one for one in verdict.lost if one not in typed]
        return CoordinatorOutcome(self._scenario, verdict, ended, self._resume_ms(), self._history)

    def _resume_ms(self) -> float | None:
        """Return the time from the first strike to the token after the longest pause of the first answer since then."""
        struck = next((e["t"] for e in self._history.of("fault")), None)
        tokens = [e["t"] for e in self._history.of("token") if e["request"] == self._name(0)]
        if struck is None or not tokens or tokens[-1] <= struck:
            return None
        times = [struck, *(t for t in tokens if t > struck)]
        _, after = max((b - a, b) for a, b in pairwise(times))
        return (after - struck) * 1e3

    def _expected_by_name(self) -> dict[str, tuple[int, ...]]:
        expected = {}
        for number, place in enumerate(self._scenario.requests):
            name, known = self._name(number), self._campaign.expected[place]
            if self._campaign.questions[place].sort is Sort.SAMPLED:
                said = tuple(e["token"] for e in self._history.of("token") if e["request"] == name)
                known = (*said, *known)[: len(known)]  # any token will do, but all of them must come
            expected[name] = known
        return expected
