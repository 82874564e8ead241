"""The capacity of a loaded plan: lanes, rows, prefill window, and each stage's memory for KV caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.core.limits import MAX_QUEUE, PREFILL_CHUNK
from cluster.core.text import gib_in_words
from cluster.scheduler.kv_cost import Cost, CostOf


@dataclass(frozen=True, slots=True)
class Capacity:
    """The scheduler's limits for one loaded plan.

    ``budget``: bytes for all caches, per stage. ``prefix_budget``: the part of it that kept prefixes and marks may
    use. ``mark_cost_of``: the bytes of a mark at a length; None if the model's caches can all be trimmed.
    ``rows``: maximum sequences per lane (1 if the caches cannot be batched). ``window``: maximum prefill frames in
    the ring. ``chunk``: maximum tokens per prefill frame, unless longer ones are measured to be better;
    ``max_chunk``: then the maximum after so many tokens, by memory. ``fixed_chunk``: every chunk has ``chunk`` tokens
    if nobody else decodes. ``scored_chunk``: the maximum for a frame that reports log-probabilities of its tokens,
    which needs memory for their logits. ``max_step_ms``: maximum time of a prefill frame on a stage while other
    sequences decode; None means no maximum. ``queue``: maximum waiting requests. ``verify_costs``: for each number of
    tokens of one sequence that a frame may verify at once, how often it takes each stage's time of one token.
    """

    lanes: int
    rows: int
    window: int
    budget: Cost
    prefix_budget: Cost
    cost_of: CostOf
    mark_cost_of: CostOf | None = None
    chunk: int = PREFILL_CHUNK
    max_chunk: Callable[[int], int] = lambda context: PREFILL_CHUNK
    fixed_chunk: bool = False
    scored_chunk: int = PREFILL_CHUNK
    max_step_ms: float | None = None
    queue: int = MAX_QUEUE
    verify_costs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def why_never_fits(self, tokens: int, taken: Cost = ()) -> str:
        """Return why a sequence of ``tokens`` tokens can never be admitted, or an empty string if it can.

        ``taken`` are bytes of each stage's budget that are used for other things; () for none.
        """
        budgets = [b - t for b, t in zip(self.budget, taken or (0,) * len(self.budget), strict=True)]
        for stage, (cost, budget) in enumerate(zip(self.cost_of(tokens), budgets, strict=True)):
            if cost > budget:
                return (
                    f"{tokens} tokens of prompt and answer need {gib_in_words(cost)} of KV cache on stage {stage}, "
                    f"which has {gib_in_words(budget)}; shorten the prompt or lower max_tokens"
                )
        return ""
