"""One accepted request on its way: how much of its prompt is on the stages, and what it has said so far."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.types import Request


class Phase(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class Sequence:
    """The scheduler's record of a request. Only the scheduler changes it.

    All but the last token of the prompt are prefilled; the last one is the first decode step, as in mlx-lm.
    ``sent`` counts prompt tokens in frames that were written, ``prefilled`` those whose frames came back.
    """

    request: Request
    id: int
    lane: int = -1
    sent: int = 0
    prefilled: int = 0
    produced: int = 0
    next_token: int | None = None
    """The token that the next decode frame feeds; None while one is under way."""

    @property
    def phase(self) -> Phase:
        if self.lane < 0:
            return Phase.QUEUED
        return Phase.PREFILL if self.prefilled < self.prefill_length else Phase.DECODE

    @property
    def prefill_length(self) -> int:
        return len(self.request.prompt) - 1

    @property
    def unsent(self) -> int:
        """Prompt tokens that still have to go out as prefill."""
        return self.prefill_length - self.sent
