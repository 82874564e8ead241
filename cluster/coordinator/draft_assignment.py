"""Decide which draft models fit a target, and which spare worker holds one. Loads nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.coordinator.model_reader import ModelInfo, ModelReader
from cluster.coordinator.planner import make_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidOption, MacpipeError, NoPlan
from cluster.core.plan import LayerRange, Plan, StageSpec
from cluster.core.worker import WorkerInfo


@dataclass(frozen=True, slots=True)
class DraftAssignment:
    """A draft model, and the plan of the one worker that holds all of it."""

    model_info: ModelInfo
    plan: Plan
    worker: WorkerInfo
    target_vocabulary: int


async def read_draft(reader: ModelReader, target: ModelInfo, order: LoadOrder) -> ModelInfo | None:
    """Read the draft model of an order, if it has one. Raises ``InvalidOption`` if it does not fit the target."""
    if not order.draft:
        return None
    try:
        draft = await reader.read(draft_order(order, target.shape.max_context))
    except InvalidOption:  # its own limit is lower, so longer requests get no drafts
        draft = await reader.read(LoadOrder(order.draft))
    await draft.text.close()  # nobody sends it text
    require_matching_draft(target, draft)
    return draft


def draft_order(order: LoadOrder, max_context: int) -> LoadOrder:
    """Return the order by which the draft model of an order is read, with room for as many tokens as its target."""
    return LoadOrder(order.draft, max_context=max_context)


def require_matching_draft(target: ModelInfo, draft: ModelInfo) -> None:
    """Raise ``InvalidOption`` unless the tokens of both models are the same, and the draft can take back its own."""
    name, other = draft.shape.model.name, target.shape.model.name
    ours, theirs = draft.tokenizer.vocab_size, target.tokenizer.vocab_size
    if ours != theirs:
        raise InvalidOption(
            f"the draft model {name} has {ours} tokens, but {other} has {theirs}: a draft needs the same vocabulary",
            field="draft",
        )
    if draft.tokenizer.vocabulary() != target.tokenizer.vocabulary():
        raise InvalidOption(
            f"the draft model {name} has as many tokens as {other}, but others: a draft needs the same tokenizer",
            field="draft",
        )
    if not draft.shape.trimmable:
        raise InvalidOption(
            f"the caches of the draft model {name} cannot be trimmed after a wrong guess; choose another draft",
            field="draft",
        )


def assign_draft(
    epoch: int, target: ModelInfo, draft: ModelInfo, workers: Sequence[WorkerInfo], busy: Collection[str]
) -> DraftAssignment:
    """Choose the worker for a draft model among those that hold no layer of its target. Raises ``NoPlan``.

    One that holds the draft model already is chosen first.
    """
    name = draft.shape.model.name
    spares = [w for w in workers if w.name not in busy]
    if not spares:
        raise NoPlan(
            f"no Mac is left for the draft model {name}: start another worker, which may run on the coordinator's Mac, "
            "or use fewer for the model with --workers"
        )
    try:
        holders = [w for w in spares if _holds(w, draft)]
        plan = make_plan(epoch, draft.shape, holders or spares, LoadOrder(name, worker_count=1))
    except MacpipeError as e:
        raise NoPlan(f"the draft model {name} does not fit a Mac that is left: {e.sentence}") from e
    worker = next(w for w in spares if w.name == plan.stages[0].worker)
    return DraftAssignment(draft, plan, worker, target.shape.vocabulary)


def _holds(worker: WorkerInfo, draft: ModelInfo) -> bool:
    shape = draft.shape
    whole = StageSpec(0, 0, 1, shape.model, LayerRange(0, shape.layers), shape.max_context)
    return bool(worker.epoch) and worker.load_key == whole.load_key
