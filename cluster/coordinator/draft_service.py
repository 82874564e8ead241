"""Serve a draft model for another model: choose a spare worker, load the draft there, and connect it as a ring of one.

The ring's frames come from the engine loop's thread, on which their replies are handled too. If it is lost, the target
goes on without drafts until it is loaded again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cluster.coordinator.epoch import ControlOf, EpochBuilder
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.planner import make_plan
from cluster.coordinator.ring import Ring
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.slice_loading import Progress
from cluster.coordinator.weight_distribution import WeightDistribution
from cluster.core.errors import InvalidOption, MacpipeError, NoPlan
from cluster.core.frames import Frame
from cluster.core.limits import PREFILL_CHUNK
from cluster.core.plan import Plan
from cluster.core.worker import WorkerInfo
from cluster.scheduler.draft_guesser import DraftGuesser, DraftModel
from cluster.transport.streams import Dialer
from cluster.wire.frame_codec import decode, encode

log = logging.getLogger(__name__)

OnLoop = Callable[[Callable[[], bool]], None]
"""Runs a job on the engine loop's thread, which then sends guesses if the job returns True."""


@dataclass(frozen=True, slots=True)
class DraftAssignment:
    """A draft model, and the plan of the one worker that holds all of it."""

    model_info: ModelInfo
    plan: Plan
    worker: WorkerInfo
    target_vocabulary: int


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
    """Choose the worker for a draft model among those that hold no layer of its target. Raises ``NoPlan``."""
    name = draft.shape.model.name
    spares = [w for w in workers if w.name not in busy]
    if not spares:
        raise NoPlan(
            f"no Mac is left for the draft model {name}: start another worker, which may run on the coordinator's Mac, "
            "or use fewer for the model with --workers"
        )
    try:
        plan = make_plan(epoch, draft.shape, spares, LoadOrder(name, worker_count=1))
    except MacpipeError as e:
        raise NoPlan(f"the draft model {name} does not fit a Mac that is left: {e.sentence}") from e
    worker = next(w for w in spares if w.name == plan.stages[0].worker)
    return DraftAssignment(draft, plan, worker, target.shape.vocabulary)


class DraftService:
    """A draft model on its worker. ``problem`` says why it does not guess; "" while it does."""

    def __init__(
        self, assignment: DraftAssignment, dialer: Dialer, weights: WeightDistribution, control: ControlOf
    ) -> None:
        self._assignment = assignment
        self._dialer, self._weights, self._control = dialer, weights, control
        self._ring: Ring | None = None
        self._lost = False
        self.problem = "the draft model is not loaded yet"
        plan, shape = assignment.plan, assignment.model_info.shape
        model = DraftModel(
            plan.epoch,
            shape.vocabulary,
            assignment.target_vocabulary,
            shape.max_context,
            plan.max_sequences * shape.max_context,
            PREFILL_CHUNK,
        )
        self.guesser = DraftGuesser(model, self._send)

    async def open(self, progress: Progress, on_loop: OnLoop) -> None:
        """Load the model and connect it. Raises ``MacpipeError``."""
        plan, workers = self._assignment.plan, (self._assignment.worker,)

        def received(message: bytes) -> None:
            on_loop(lambda: self._receive(message))

        def lost(epoch: int, worker: str, why: str) -> None:
            on_loop(lambda: self._fail(f"{worker}: {why}"))

        builder = EpochBuilder(
            self._dialer, self._weights, self._assignment.model_info, self._control, progress, received, lost
        )
        await builder.load(plan, workers)
        self._ring = await builder.connect(await builder.link(plan, workers))
        on_loop(self._begin)

    def close(self) -> None:
        """Close the ring. Called once the engine loop has stopped."""
        if self._ring:
            self._ring.close()

    # On the engine loop's thread

    def _begin(self) -> bool:
        if not self._lost:
            self.problem = ""
            self.guesser.open()
        return False

    def _send(self, frame: Frame) -> None:
        if self._ring:
            self._ring.send(encode(frame))

    def _receive(self, message: bytes) -> bool:
        try:
            return self.guesser.receive(decode(message))
        except MacpipeError as e:
            return self._fail(e.sentence)

    def _fail(self, why: str) -> bool:
        if not self._lost:
            self._lost = True
            log.warning("draft: lost reason=%s", why)
            self.problem = f"the draft model is lost ({why}); load the model again to have it back"
        self.guesser.close()
        if self._ring:
            self._ring.close()
        return False
