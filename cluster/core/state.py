"""A coordinator's state, and a repair or planned move under way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ServingState(StrEnum):
    """The coordinator's state. ``FAILED`` comes with a sentence that says why."""

    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """A state that this client's version does not know."""


@dataclass(frozen=True, slots=True)
class Repair:
    """A recovery from a loss, or a planned move of layers.

    ``expected_seconds`` counts from the start; 0 means that it waits for a Mac.
    """

    worker: str
    cause: str
    since_seconds: float
    doing: str
    expected_seconds: float
    attempts: int
