"""Know whether workers can hold what a service served, from headers of its default model that are on this Mac."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.coordinator.draft_assignment import draft_order
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.model_reader import ModelReader
from cluster.coordinator.planner import make_plan
from cluster.coordinator.replicated_service import ReplicatedService
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.plan import ModelShape
from cluster.core.worker import WorkerInfo

__all__ = ["ModelFit"]


class ModelFit:
    """Whether workers can hold the model that is loaded first. If none was loaded, any worker will do.

    ``reader`` then has begun to read that model ahead.
    """

    def __init__(self, reader: ModelReader) -> None:
        self.reader = reader
        self._order: LoadOrder | None = None
        self._shape: ModelShape | None = None
        self.problem = ""
        """Why the models cannot be served by this Mac, so that it cannot lead; "" if they can."""

    @property
    def is_prepared(self) -> bool:
        """Whether a load of the model that is loaded first need not wait for its files, or none is loaded."""
        return not self.problem and (self._order is None or self.reader.is_ahead)

    async def prepare(self, service: ReplicatedService) -> None:
        """Read the headers of the model that is loaded first, unless they are known. A failure is noted.

        Without one, begin to read the rest of what a leader needs of the model, and of its draft model.
        """
        try:
            ModelCatalog(service.models, service.guests)
        except InvalidOption as e:  # of a leader of another version
            self._order, self._shape, self.problem = None, None, f"this Mac could not serve these models: {e.sentence}"
            return
        first = next(iter(service.loaded), "")
        order = next((entry.order for entry in (*service.models, *service.guests) if entry.name == first), None)
        if order == self._order and not self.problem:
            return
        self._order, self._shape, self.problem = order, None, ""
        if order is None:
            return
        try:
            self._shape = await self.reader.read_shape(order)
        except MacpipeError as e:
            self.problem = f"this Mac could not serve {order.model}: {e.sentence}"
        else:
            drafts = [draft_order(order, self._shape.max_context)] if order.draft else []
            await self.reader.read_ahead(order, *drafts)

    def __call__(self, workers: Sequence[WorkerInfo]) -> bool:
        """Return whether these workers can hold the model, in as many pieces as it takes."""
        if not workers or self.problem:
            return False
        if self._order is None:
            return True
        if self._shape is None:
            return False
        try:
            make_plan(0, self._shape, workers, replace(self._order, worker_count=None, layers=None))
        except MacpipeError:
            return False
        return True
