"""Ask the planner whether a model would fit once other models have left memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.coordinator.planner import Links, make_plan
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import DoesNotFit
from cluster.core.plan import ModelShape
from cluster.core.worker import WorkerInfo


@dataclass(frozen=True, slots=True)
class RoomQuestion:
    """The workers and what is held on them at one moment. Any thread may ask, since nothing of it changes.

    ``view`` is the model's own, and ``workers`` have all their memory. ``lacks_macs``: others are away that may come
    back.
    """

    shape: ModelShape
    order: LoadOrder
    workers: Sequence[WorkerInfo]
    view: RosterView
    links: Links
    lacks_macs: bool

    def refusal(self, leaving: Collection[str]) -> DoesNotFit | None:
        """Return why there is no room once these holders of slices have left; None if there is.

        Raises ``NoPlan`` or ``InvalidOption`` if the order cannot be planned, however much memory there is.
        """
        try:
            make_plan(0, self.shape, self.view.without(leaving).focus_all(self.workers), self.order, self.links)
        except DoesNotFit as e:
            return e
        return None
