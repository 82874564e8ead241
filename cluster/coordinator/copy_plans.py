"""Plan the further replicas of several models, as the coordinator loads them: on Macs that hold no layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cluster.coordinator.planner import plan_over
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import NoPlan
from cluster.core.plan import ModelShape, Plan
from cluster.core.text import count_in_words, names_in_words
from cluster.placement.candidates import Candidates

__all__ = ["NO_MAC", "CopiedModel", "PlannedCopies", "copy_rank", "plan_copies"]

NO_MAC: Final = "no Mac without layers is free for it"


@dataclass(frozen=True, slots=True)
class CopiedModel:
    """A model whose first replica has its plan, and the Macs that it may use.

    ``replicas`` is how many there should be, the first one included; None: as many as there are idle Macs for.
    """

    name: str
    shape: ModelShape
    order: LoadOrder
    candidates: Candidates
    replicas: int | None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PlannedCopies:
    """The plans of the further replicas of each model, by its name, and why it has no more of them."""

    plans: dict[str, list[Plan]] = field(default_factory=dict)
    why_missing: dict[str, str] = field(default_factory=dict)

    def explain(self, models: Sequence[CopiedModel]) -> Iterator[str]:
        """Yield where the copies of each model are, and which of those are missing that were asked for."""
        for model in models:
            places = [names_in_words([stage.worker for stage in plan.stages]) for plan in self.plans[model.name]]
            count = len(places) + 1
            if places:
                yield f"{model.name} has {count_in_words(count, 'replica')}, copies of it on {'; '.join(places)}"
            if model.replicas is None and not places:
                yield f"{model.name} has no copy: {self.why_missing[model.name]}"
            if model.replicas is not None and count < model.replicas:
                asked = count_in_words(model.replicas, "replica")
                yield f"{model.name} has {count} of {asked}: {self.why_missing[model.name]}"


def copy_rank(replicas: int | None, count: int, priority: int) -> tuple[bool, int, int]:
    """Return by what models get copies, the least first, of a model with so many replicas now.

    One that is asked for by number comes first, then the one with the fewest replicas, then the most important one.
    """
    return replicas is None, count, -priority


def plan_copies(models: Sequence[CopiedModel], used: Collection[str]) -> PlannedCopies:
    """Return the plans of further replicas, one after the other, on those Macs that are not ``used``."""
    copies = PlannedCopies({model.name: [] for model in models})
    used, left = set(used), {model.name: model for model in models}
    while left:
        model = min(left.values(), key=lambda one: copy_rank(one.replicas, len(copies.plans[one.name]), one.priority))
        found = copies.plans[model.name]
        if model.replicas is not None and len(found) + 1 >= model.replicas:
            del left[model.name]
            continue
        idle = [worker for worker in model.candidates.workers if worker.name not in used]
        try:
            if not idle:
                raise NoPlan(NO_MAC)
            plan = plan_over(0, model.shape, replace(model.candidates, workers=idle), model.order)
        except NoPlan as e:
            copies.why_missing[model.name] = e.sentence
            del left[model.name]
            continue
        found.append(plan)
        used |= {stage.worker for stage in plan.stages}
    return copies
