"""Run seeds on Macs with a leader and a standby: send requests with ``AsyncClient``, strike, and check the history."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import anyio
import anyio.to_thread

from cluster.client import AsyncClient
from cluster.core.errors import MacpipeError
from faults.checker import SLACK_S, Verdict, check
from faults.coordinator_fleet import CLUSTER, CoordinatorFleet, Mac
from faults.coordinator_scenario import CoordinatorScenario, Sort, Strike, questions
from faults.history import History

DEADLINE_S = 90.0


@dataclass
class CoordinatorOutcome:
    """A seed's verdict. ``ended``: answers that a typed error ended where two faults may cost an answer.

    ``refused``: requests that were never accepted. ``resume_ms``: from the first strike to the first answer's next
    token; None if there was none.
    """

    scenario: CoordinatorScenario
    verdict: Verdict
    ended: list[str]
    refused: list[str]
    resume_ms: float | None
    history: History

    @property
    def kept(self) -> bool:
        return self.verdict.kept

    def facts(self) -> dict[str, Any]:
        """Return a line of ``outcomes.jsonl``."""
        v = self.verdict
        return {
            "seed": self.scenario.seed,
            "kind": self.scenario.kind,
            "faults": [e["what"] for e in self.history.of("fault")],
            "requests": v.requests,
            "lost": v.lost,
            "hung": v.hung,
            "differing": v.differing,
            "ended": self.ended,
            "refused": self.refused,
            "resume_ms": self.resume_ms,
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
        """Mend the fleet, then run the scenario. Raises ``Unmended``."""
        self.fleet.mend()
        run = _Run(self, scenario)
        anyio.run(run.play)
        return run.judge()


@dataclass
class _Run:
    campaign: CoordinatorCampaign
    scenario: CoordinatorScenario
    history: History = field(default_factory=History)
    began: threading.Event = field(default_factory=threading.Event)

    async def play(self) -> None:
        fleet, scenario = self.campaign.fleet, self.scenario
        self.history.note("seed", seed=scenario.seed, leader=fleet.leader.name, clock=time.time())
        aims = await anyio.to_thread.run_sync(fleet.aim, scenario.strikes, scenario.seed)
        with anyio.move_on_after(DEADLINE_S + 2 * SLACK_S):
            async with anyio.create_task_group() as tasks:
                for strike, aim in zip(scenario.strikes, aims, strict=True):
                    tasks.start_soon(anyio.to_thread.run_sync, self._strike, strike, *aim)
                async with anyio.create_task_group() as requests:
                    for number in range(len(scenario.requests)):
                        requests.start_soon(self._request, number)
                self.began.set()  # an answer that was too short is struck at its end

    async def _request(self, number: int) -> None:
        question = self.campaign.questions[self.scenario.requests[number]]
        name = self._name(number)
        self.history.note("sent", request=name)
        try:
            async with AsyncClient(self.campaign.fleet.addresses, cluster=CLUSTER, timeout_s=DEADLINE_S) as client:
                stream = client.stream(list(question.prompt), request_id=name, **question.options)
                await stream.wait_accepted()
                self.history.note("accepted", request=name)
                async for token in stream:
                    self.history.note("token", request=name, index=token.index, token=token.token)
                    if number == 0 and token.index >= self.scenario.token:
                        self.began.set()
                self.history.note("finish", request=name)
        except MacpipeError as e:
            self.history.note("error", request=name, reason=e.reason, sentence=e.sentence)
        if number == 0:
            self.began.set()

    def _strike(self, strike: Strike, mac: Mac, role: str) -> None:
        self.began.wait(DEADLINE_S)
        time.sleep(strike.after_s)
        words = f"{strike.blow} {strike.target} {mac.name}"
        self.campaign.fleet.strike(mac, role, strike.blow)
        self.history.note("fault", what=words)
        if strike.back_s is not None:
            time.sleep(strike.back_s)
            self.campaign.fleet.undo(mac, role, strike.blow)
            self.history.note("back", what=words)

    def _name(self, number: int) -> str:
        return f"c{self.scenario.seed}-{number}-{id(self):x}"

    def judge(self) -> CoordinatorOutcome:
        verdict = check(self.history, self._expected_by_name(), DEADLINE_S)
        ended = []
        if not self.scenario.keeps_all:
            ended = [one for one in verdict.lost if "without a type" not in one]
            verdict.lost = [one for one in verdict.lost if one not in ended]
        accepted = {e["request"] for e in self.history.of("accepted")}
        refused = [f"{e['request']}: {e['reason']}" for e in self.history.of("error") if e["request"] not in accepted]
        return CoordinatorOutcome(self.scenario, verdict, ended, refused, self._resume_ms(), self.history)

    def _resume_ms(self) -> float | None:
        """Return the time from the first strike to the token after the longest pause of the first answer since then."""
        struck = next((e["t"] for e in self.history.of("fault")), None)
        tokens = [e["t"] for e in self.history.of("token") if e["request"] == self._name(0)]
        if struck is None or not tokens or tokens[-1] <= struck:
            return None
        times = [struck, *(t for t in tokens if t > struck)]
        _, after = max((b - a, b) for a, b in pairwise(times))
        return round((after - struck) * 1e3, 1)

    def _expected_by_name(self) -> dict[str, tuple[int, ...]]:
        expected = {}
        for number, place in enumerate(self.scenario.requests):
            name, known = self._name(number), self.campaign.expected[place]
            if self.campaign.questions[place].sort is Sort.SAMPLED:
                said = tuple(e["token"] for e in self.history.of("token") if e["request"] == name)
                known = (*said, *known)[: len(known)]  # any token will do, but all of them must come
            expected[name] = known
        return expected
