"""What a coordinator is doing: its state, and a repair or a planned move under way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ServingState(StrEnum):
    """What the coordinator is doing. ``FAILED`` comes with a sentence that says why."""

    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """A state that this client's version has no word for."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What is being done about a loss, or to move layers as planned. ``expected_seconds`` counts from its beginning; 0:
    it waits for a Mac.
    """

    worker: str
    cause: str
    since_seconds: float
    doing: str
    expected_seconds: float
    attempts: int
