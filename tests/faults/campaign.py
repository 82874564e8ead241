"""Run seeds on one fleet: send requests, inject faults, wait for the ends, and check the history."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from cluster.client import Client
from cluster.core.errors import MacpipeError
from faults.checker import SLACK_S, Verdict, check
from faults.fleet import Fleet
from faults.history import History
from faults.scenario import HARMLESS, ORDERLY, Asked, Fault, Moment, Scenario, pool, scenario

DEADLINE_S = 60.0
VOCABULARY = 700


@dataclass
class Outcome:
    """One seed's verdict, and the times of detection and recovery (ms; None: nothing was lost)."""

    seed: int
    verdict: Verdict
    detect_ms: float | None
    resume_ms: float | None
    evicted: bool
    """A recovery where nothing worse was done than to slow links, or to have workers leave in good order."""
    history: History

    @property
    def kept(self) -> bool:
        return self.verdict.kept and not self.evicted

    def facts(self) -> dict[str, object]:
        """One line of ``outcomes.jsonl``."""
        v = self.verdict
        broken = {"lost": v.lost, "hung": v.hung, "differing": v.differing, "slow": v.slow, "evicted": self.evicted}
        return {
            "seed": self.seed,
            "faults": [e["what"] for e in self.history.of("fault")],
            "requests": v.requests,
            "detect_ms": self.detect_ms,
            "resume_ms": self.resume_ms,
            **{name: found for name, found in broken.items() if found},
        }


class Campaign:
    """``expected`` tokens are asked of the undisturbed fleet first."""

    def __init__(self, fleet: Fleet, asked: tuple[Asked, ...] | None = None) -> None:
        self.fleet = fleet
        self.asked = asked or pool(VOCABULARY)
        self.expected = [self._ask(a) for a in self.asked]

    def _ask(self, asked: Asked) -> tuple[int, ...]:
        return self.fleet.client.generate(
            list(asked.prompt), max_tokens=asked.max_tokens, ignore_eos=True, model=asked.model, **dict(asked.sampling)
        ).tokens

    def run(self, seed: int) -> Outcome:
        """Run a seed."""
        return self.play(scenario(seed, self.asked, self.fleet.stages))

    def play(self, played: Scenario) -> Outcome:
        """Run a given scenario."""
        self.fleet.find_workers(announced=played.announced)
        self.fleet.mend()
        return _Run(self, played).play()


class _Run:
    def __init__(self, campaign: Campaign, played: Scenario) -> None:
        self._fleet, self._asked, self._expected = campaign.fleet, campaign.asked, campaign.expected
        self._scenario, self._history = played, History()
        self._plan = campaign.fleet.plan()
        self._struck = threading.Event()

    def play(self) -> Outcome:
        s, history = self._scenario, self._history
        history.note("seed", seed=s.seed, plan=self._plan, faults=[f"{f.kind} {f.stage} {f.moment}" for f in s.faults])
        end_watch = self._fleet.watching(history)
        threads = [threading.Thread(target=self._request, args=(i,), daemon=True) for i in range(len(s.requests))]
        threads += [threading.Thread(target=self._second, args=(f,), daemon=True) for f in s.faults[1:]]
        for thread in threads:
            thread.start()
        until = time.monotonic() + DEADLINE_S + 2 * SLACK_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        time.sleep(0.05)
        end_watch()
        for answered in self._fleet.monitor.take():
            history.note("status", began=answered.began, took_s=answered.took_s, error=answered.error)
        return self._judged()

    def _judged(self) -> Outcome:
        expected = {f"s{self._scenario.seed}-{i}": self._expected[r] for i, r in enumerate(self._scenario.requests)}
        verdict = check(self._history, expected, DEADLINE_S)
        struck = next((e["t"] for e in self._history.of("fault")), None)
        down = next(
            (e["t"] for e in self._history.of("health") if struck and not e["serving"] and e["t"] > struck), None
        )
        back = next((e["t"] for e in self._history.of("token") if down and e["t"] > down), None)
        evicted = down is not None and all(f.kind in HARMLESS | ORDERLY for f in self._scenario.faults)
        detect = None if down is None or struck is None else (down - struck) * 1e3
        resume = None if back is None or struck is None else (back - struck) * 1e3
        return Outcome(self._scenario.seed, verdict, detect, resume, evicted, self._history)

    def _request(self, i: int) -> None:
        asked = self._asked[self._scenario.requests[i]]
        name = f"s{self._scenario.seed}-{i}"
        time.sleep(self._scenario.starts[i])
        self._history.note("sent", request=name)
        try:
            with Client(self._fleet.address, timeout_s=DEADLINE_S) as client:
                self._follow(client, name, asked, first=i == 0)
        except MacpipeError as e:
            self._history.note("error", request=name, reason=e.reason, sentence=e.sentence)
        if i == 0:
            self._strike_at(-1)

    def _follow(self, client: Client, name: str, asked: Asked, *, first: bool) -> None:
        stream = client.stream(
            list(asked.prompt),
            max_tokens=asked.max_tokens,
            ignore_eos=True,
            request_id=name,
            model=asked.model,
            **dict(asked.sampling),
        )
        stream.wait_accepted()
        self._history.note("accepted", request=name)
        if first and self._scenario.faults[0].moment is Moment.PREFILL:
            self._strike_at(-1)
        for token in stream:
            self._history.note("token", request=name, index=token.index, token=token.token)
            if first:
                self._strike_at(token.index)
        assert stream.finish
        self._history.note("finish", request=name, reason=str(stream.finish.reason))

    def _strike_at(self, token: int) -> None:
        """Fire the first fault if its time has come; -1: whatever its token is."""
        fault = self._scenario.faults[0]
        if not self._struck.is_set() and (token < 0 or token >= fault.token):
            self._struck.set()
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        self._history.note("fault", kind=str(fault.kind), what=self._fleet.strike(fault, self._plan))

    def _second(self, fault: Fault) -> None:
        """Strike once the first loss has been noticed, or while a worker is leaving."""
        self._struck.wait(DEADLINE_S)
        if self._scenario.faults[0].kind in ORDERLY:
            time.sleep(0.05 * (self._scenario.seed % 16))
            self._strike(fault)
            return
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            if any(not e["serving"] for e in self._history.of("health")):
                time.sleep(0.05 * (self._scenario.seed % 8))
                self._strike(fault)
                return
            time.sleep(0.01)


@dataclass
class Summary:
    """The output of ``ops/chaos``. Times are milliseconds, over the seeds in which something was lost.

    ``unplayed`` seeds had no time, or their fleet ended early, as ``ended_early`` says.
    """

    seeds: int = 0
    requests: int = 0
    lost: int = 0
    hung: int = 0
    differing: int = 0
    slow: int = 0
    evicted: int = 0
    unplayed: int = 0
    ended_early: list[str] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    detect: list[float] = field(default_factory=list)
    resume: list[float] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every seed that was played kept the promise, and every fleet could go on."""
        return not self.failed and not self.ended_early

    def add(self, outcome: Outcome) -> None:
        v = outcome.verdict
        self.seeds += 1
        self.requests += v.requests
        self.lost += len(v.lost)
        self.hung += len(v.hung)
        self.differing += len(v.differing)
        self.slow += len(v.slow)
        self.evicted += outcome.evicted
        if not outcome.kept:
            self.failed.append(outcome.seed)
        self.detect += [outcome.detect_ms] if outcome.detect_ms is not None else []
        self.resume += [outcome.resume_ms] if outcome.resume_ms is not None else []

    def merge(self, other: Summary) -> None:
        """Add the results of another fleet."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def facts(self) -> dict[str, object]:
        return {
            "seeds": self.seeds,
            "requests": self.requests,
            "lost": self.lost,
            "hung": self.hung,
            "differing": self.differing,
            "slow": self.slow,
            "evicted": self.evicted,
            "detect_ms": quantiles(self.detect),
            "resume_ms": quantiles(self.resume),
            "failed_seeds": sorted(self.failed),
            "unplayed": self.unplayed,
            "ended_early": self.ended_early,
        }


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, rounded; empty for no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50": round(statistics.median(ordered), 1), "p99": round(p99, 1), "n": len(ordered)}


def complaint(outcome: Outcome, folder: Path) -> str:
    """Return the report of a failed seed; its history is stored in ``folder``."""
    path = folder / f"seed-{outcome.seed}.jsonl"
    outcome.history.save(path)
    v = outcome.verdict
    broken = {"lost": v.lost, "hung": v.hung, "differing": v.differing, "slow": v.slow, "evicted": outcome.evicted}
    said = json.dumps(broken)
    faults = [e["what"] for e in outcome.history.of("fault")]
    return f"seed {outcome.seed} ({'; '.join(faults)}): {said}; history in {path}"
