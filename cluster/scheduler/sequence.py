"""One accepted request on its way: how much of its prompt is on the stages, and what it has said so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from cluster.core.request import Request


class Phase(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of a request. Only the scheduler changes it.

    All but the last token of ``base`` are prefilled; the last one is the first decode step, as in mlx-lm. The base is
    the prompt, and after a recovery the prompt and what was said until then. ``prefilled`` counts tokens of it that
    are on every stage, ``cached`` those of them that a kept prefix brought.
    """

    request: Request
    id: int
    lane: int = -1
    prefilled: int = 0
    cached: int = 0
    turn: int = 0
    """When it began to decode, among all sequences; 0 before."""
    fed: list[int] = field(default_factory=list)
    """Every token in a frame that was written, those of a restored prefix too."""
    leader: Sequence | None = None
    """Another sample of the same prompt, which prefills it for this one."""
    joined: bool = False
    """The stages have been told of it."""
    broken: bool = False
    """A step of it failed: stages do not hold the same of it any more."""
    served: int = 0
    """How many frames had been written when its prompt last had its turn, or when it joined."""
    next_token: int | None = None
    """The token that the next decode frame feeds; None while one is under way."""
    said: list[int] = field(default_factory=list)
    """The answer so far."""
    base: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.base = (*self.request.prompt, *self.said)

    def begin_anew(self) -> None:
        """The stages have forgotten it: all that was said has to be prefilled again, and it needs a lane.

        Samples of one prompt have parted by now, so none follows another.
        """
        self.base = (*self.request.prompt, *self.said)
        self.lane, self.prefilled, self.cached, self.turn = -1, 0, 0, 0
        self.fed, self.next_token, self.joined, self.leader = [], None, False, None

    @property
    def produced(self) -> int:
        """Tokens of the answer so far."""
        return len(self.said)

    @property
    def phase(self) -> Phase:
        if self.lane < 0:
            return Phase.QUEUED
        return Phase.PREFILL if self.prefilled < self.prefill_length else Phase.DECODE

    @property
    def prefill_length(self) -> int:
        return len(self.base) - 1

    @property
    def follows(self) -> bool:
        """Whether it waits for its leader's prompt, to start from a copy of it."""
        return self.leader is not None and self.leader.unsent > 0

    @property
    def unsent(self) -> int:
        """Tokens of the base that still have to go out as prefill."""
        return max(self.prefill_length - len(self.fed), 0)

    @property
    def reserved(self) -> int:
        """Tokens that its caches hold at most."""
        return len(self.request.prompt) + self.request.max_tokens
