"""Load models again that left memory for another one only since their caches had all of it.

A model that is loaded alone has all that is left of its Macs for its caches. It leaves for another one although both
fit: its next load leaves room for the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping

from cluster.coordinator.deployment import Deployment
from cluster.coordinator.model_host import ModelHost
from cluster.core.cluster_state import ServingState
from cluster.core.load_limits import IDLE_CHECK_S, RETURN_WAIT_S


class ModelReturns:
    """The models that come back. ``load_beside`` loads one if there is room for it, and returns whether it did."""

    def __init__(
        self,
        host: ModelHost,
        load_beside: Callable[[str], Awaitable[bool]],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._host, self._load_beside, self._clock, self._sleep = host, load_beside, clock, sleep
        self.tasks: set[asyncio.Task[None]] = set()
        self._used_at: dict[str, float] = {}
        """When each of these was used last, before it left: nobody has asked for it since."""

    def begin(self, left: Mapping[str, float], other: str) -> None:
        """Load again, once ``other`` serves, those of the models that left for it which fit beside it.

        ``left`` has when each was used last.
        """
        if left:
            task = asyncio.create_task(self._load(left, other))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _load(self, left: Mapping[str, float], other: str) -> None:
        until = self._clock() + RETURN_WAIT_S
        # One that recovers chooses its Macs first.
        while self._host.deployments[other].state is not ServingState.SERVING:
            if self._clock() > until:
                return
            await self._sleep(IDLE_CHECK_S)
        for name, used_at in left.items():
            if await self._load_beside(name):
                self._used_at[name] = used_at

    def used_at(self, deployment: Deployment) -> float:
        """Return when a model was used or loaded last; its return was no use of it."""
        if deployment.used_at == deployment.loaded_at:  # nobody has used it since
            return self._used_at.get(deployment.name, deployment.used_at)
        return deployment.used_at

    def forget(self, name: str) -> None:
        """Forget that a model has returned: somebody asks for it."""
        self._used_at.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the models that are not among these."""
        self._used_at = {name: at for name, at in self._used_at.items() if name in names}
