"""What a loaded plan can take: lanes, rows, the ring's window, and memory for caches stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.limits import GIB, MAX_QUEUE, PREFILL_CHUNK
from cluster.scheduler.kv_cost import Cost, CostOf


@dataclass(frozen=True, slots=True)
class Capacity:
    """``budget`` is for all caches, ``prefix_budget`` the part of it that kept prefixes may take; bytes a stage.

    ``rows`` is how many sequences a lane may hold (1 where caches cannot batch), ``window`` how many prefill frames
    may be in the ring, ``chunk`` their tokens at most, ``max_step_ms`` what one may cost while others decode.
    """

    lanes: int
    rows: int
    window: int
    budget: Cost
    prefix_budget: Cost
    cost_of: CostOf
    trimmable: bool = True
    chunk: int = PREFILL_CHUNK
    max_step_ms: float | None = None
    queue: int = MAX_QUEUE

    def never_fits(self, tokens: int) -> str:
        """Why a sequence of so many tokens can never be taken; empty where it can."""
        for stage, (cost, budget) in enumerate(zip(self.cost_of(tokens), self.budget, strict=True)):
            if cost > budget:
                return (
                    f"{tokens} tokens of prompt and answer need {cost / GIB:.3g} GiB of caches on stage {stage}, "
                    f"which has {budget / GIB:.3g} GiB for them; ask for fewer"
                )
        return ""
