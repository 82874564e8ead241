"""The promise to clients, checked on a history. It knows no fault, no stage and no epoch.

Each accepted request ends once, by its deadline, complete or with one typed error; no token is missing, repeated or out
of order; tokens equal those of the undisturbed run. `status` answers in two seconds at every moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faults.history import History

STATUS_S = 2.0
"""In which `status` has to answer, at every moment."""
SLACK_S = 5.0
"""What an error at a request's deadline may take to reach its client on a busy machine."""


@dataclass
class Verdict:
    """What broke the promise. ``lost`` ended with an error, or without a word; ``hung`` did not end in time;
    ``differing`` have tokens that the undisturbed run has not; ``slow`` are calls of `status` not answered in time.
    """

    requests: int = 0
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return not (self.lost or self.hung or self.differing or self.slow)


def check(history: History, expected: Mapping[str, Sequence[int]], deadline_s: float) -> Verdict:
    """``expected`` has the undisturbed tokens of each request by its id."""
    verdict = Verdict()
    by_request: dict[str, list[dict[str, Any]]] = {}
    for event in history.events:
        if "request" in event:
            by_request.setdefault(event["request"], []).append(event)
    for name, events in by_request.items():
        if not any(e["event"] == "accepted" for e in events):
            refused = [e for e in events if e["event"] == "error"]
            if not refused or not refused[0].get("reason"):
                verdict.hung.append(f"{name}: neither accepted nor refused")
            continue
        verdict.requests += 1
        _check_end(name, events, deadline_s, verdict)
        _check_tokens(name, events, list(expected[name]), verdict)
    for event in history.of("status"):
        if event["error"] or event["took_s"] > STATUS_S:
            verdict.slow.append(f"status after {event['took_s']:.2f} s: {event['error'] or 'answered too late'}")
    return verdict


def _check_end(name: str, events: list[dict[str, Any]], deadline_s: float, verdict: Verdict) -> None:
    ends = [e for e in events if e["event"] in ("finish", "error")]
    sent = next(e["t"] for e in events if e["event"] == "sent")
    if not ends:
        verdict.hung.append(f"{name}: no end")
    elif len(ends) > 1 or events[-1] is not ends[0]:
        verdict.differing.append(f"{name}: ended {len(ends)} times, or went on after its end")
    elif ends[0]["t"] - sent > deadline_s + SLACK_S:
        verdict.hung.append(f"{name}: ended after {ends[0]['t'] - sent:.1f} s, its deadline was {deadline_s:.0f} s")
    elif ends[0]["event"] == "error":
        typed = ends[0].get("reason", "")
        verdict.lost.append(f"{name}: {typed or 'an error without a type'}: {ends[0].get('sentence', '')}")


def _check_tokens(name: str, events: list[dict[str, Any]], expected: list[int], verdict: Verdict) -> None:
    tokens = [e for e in events if e["event"] == "token"]
    indexes = [e["index"] for e in tokens]
    said = [e["token"] for e in tokens]
    if indexes != list(range(len(indexes))):
        verdict.differing.append(f"{name}: token indexes {indexes}")
    elif said != expected[: len(said)]:
        at = next((i for i, (a, b) in enumerate(zip(said, expected, strict=False)) if a != b), len(expected))
        verdict.differing.append(f"{name}: token {at} is {said[at]}, undisturbed {expected[at : at + 1]}")
    elif any(e["event"] == "finish" for e in events) and len(said) != len(expected):
        verdict.differing.append(f"{name}: complete with {len(said)} tokens of {len(expected)}")
