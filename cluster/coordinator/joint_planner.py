"""Plan several models on the same workers at once: who holds what, and how much memory each may use. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from cluster.coordinator.copy_plans import CopiedModel, plan_copies
from cluster.coordinator.planner import Links, build_plan, plan_request
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.snapshot import describe_plan
from cluster.core.errors import InvalidOption
from cluster.core.joint_plan import JointPlan, MacMemory, ModelMemory, PlannedModel, UnplacedModel
from cluster.core.limits import MAX_PLANNED_MODELS
from cluster.core.plan import ModelShape, Plan
from cluster.core.text import count_in_words
from cluster.placement.arrangement import ModelDemand
from cluster.placement.candidates import Candidates
from cluster.placement.explain_several import explain_left_out, explain_place, explain_placement
from cluster.placement.several_models import place_models

__all__ = ["CandidatesFor", "ModelToPlace", "create_demand", "plan_models", "require_model_count", "require_models"]

CandidatesFor = Callable[[ModelShape, LoadOrder], Candidates]
"""Returns the workers, with the speed that each has with a model."""


@dataclass(frozen=True, slots=True)
class ModelToPlace:
    """A model under its name, and what its user asks for.

    ``pinned`` and ``priority`` are those of ``ModelDemand``, ``replicas`` those of ``CopiedModel``.
    """

    name: str
    order: LoadOrder
    shape: ModelShape
    pinned: bool = False
    priority: int = 0
    replicas: int | None = 1

    @classmethod
    def of(cls, entry: ModelEntry, shape: ModelShape) -> Self:
        """Return an entry of a catalog with the shape of its model."""
        named = replace(shape, given_name=entry.name)
        return cls(entry.name, entry.order, named, entry.pin, entry.priority, entry.replicas)


def require_models(names: Sequence[str]) -> None:
    """Raise ``InvalidOption`` if models with these names cannot be planned at once."""
    require_model_count(len(names))
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidOption(f"two models are named {twice[0]}; name each model once", field="model")


def require_model_count(count: int) -> None:
    """Raise ``InvalidOption`` if so many models cannot be planned at once."""
    if not 1 <= count <= MAX_PLANNED_MODELS:
        raise InvalidOption(
            f"{count_in_words(count, 'model')} cannot be planned at once; name from 1 to {MAX_PLANNED_MODELS}",
            field="model",
        )


def plan_models(
    models: Sequence[ModelToPlace],
    candidates_for: CandidatesFor,
    explain: Callable[[Plan], Plan],
    links: Links | None = None,
) -> JointPlan:
    """Return plans for as many of the models as fit at once, as if none was loaded, and then for copies of them.

    ``links`` are the measured ones. ``explain`` adds to a plan what its user should know of these workers.

    Raises ``InvalidOption`` for options that cannot be, and as ``require_models``.
    """
    require_models([model.name for model in models])
    placement = place_models([create_demand(one, candidates_for(one.shape, one.order)) for one in models])
    by_name = {model.name: model for model in models}
    plans: dict[str, Plan] = {}
    for place in placement.placed:
        model, proposal = by_name[place.name], explain_place(placement, place)
        plans[model.name] = explain(build_plan(0, model.shape, proposal, model.order, placement.shares[model.name]))
    copied = [
        CopiedModel(one.name, one.shape, one.order, candidates_for(one.shape, one.order), one.replicas, one.priority)
        for one in models
        if one.name in plans and one.replicas != 1
    ]
    copies = plan_copies(copied, {stage.worker for plan in plans.values() for stage in plan.stages})
    replicas = [
        (name, number, plan)
        for name in plans
        for number, plan in enumerate((plans[name], *copies.plans.get(name, ())), 1)
    ]
    left_out = (UnplacedModel(one.demand.name, explain_left_out(one), one.unload) for one in placement.left_out)
    return JointPlan(
        tuple(PlannedModel(name, describe_plan(plan, links), number) for name, number, plan in replicas),
        tuple(left_out),
        _measure_memory(candidates_for(models[0].shape, models[0].order), [(name, plan) for name, _, plan in replicas]),
        (*explain_placement(placement), *copies.explain(copied)),
    )


def create_demand(model: ModelToPlace, candidates: Candidates) -> ModelDemand:
    """Return what the placement has to know of a model on these workers. Raises ``InvalidOption``."""
    request = plan_request(model.order)
    contexts, groups = model.order.cached_contexts, model.order.groups
    return ModelDemand(model.name, model.shape, candidates, request, model.pinned, model.priority, contexts, groups)


def _measure_memory(candidates: Candidates, plans: Iterable[tuple[str, Plan]]) -> tuple[MacMemory, ...]:
    """Return every worker's memory, and what each model uses of it."""
    uses: dict[str, list[ModelMemory]] = {worker.name: [] for worker in candidates.workers}
    for name, plan in plans:
        for stage in plan.stages:
            uses[stage.worker].append(ModelMemory(name, stage.weight_bytes, stage.cache_bytes))
    return tuple(MacMemory(w.name, w.memory.usable, tuple(uses[w.name])) for w in candidates.workers)
