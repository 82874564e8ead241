"""Know how many tokens of context models will have once they are loaded, for clients that ask before that."""

from __future__ import annotations

import asyncio
import logging

from cluster.coordinator.model_host import ModelHost
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import MacpipeError
from cluster.core.load_limits import COMING_READ_S

log = logging.getLogger(__name__)


class PromisedContexts:
    """Reads headers once for each order of the catalog, one model at a time."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host
        self._known: dict[LoadOrder, int] = {}
        self._reading = asyncio.Lock()

    async def read(self, requested: str) -> int:
        """Return how many tokens of context the next load of a model promises; 0 if that cannot be read in time.

        Raises ``ModelNotFound``.
        """
        catalog = self._host.deployments.catalog
        entry, _ = catalog.resolve(requested)
        if entry.order not in self._known:
            orders = {one.order for one in catalog}
            self._known = {order: tokens for order, tokens in self._known.items() if order in orders}
            try:
                async with asyncio.timeout(COMING_READ_S), self._reading:
                    tokens = await self._host.deployments[entry.name].read_context(entry.order)
            except (MacpipeError, OSError) as e:  # a TimeoutError is an OSError
                log.info("contexts: not read reason=%s model=%s", e, entry.name)
                return 0
            self._known[entry.order] = tokens
        return self._known[entry.order]
