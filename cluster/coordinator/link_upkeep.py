"""Notice that a better link between two stages has appeared, such as a cable that was plugged in.

The workers measure only addresses that are new to them, so a look costs nothing while no cable changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import pairwise

from cluster.coordinator.epoch import Epoch
from cluster.coordinator.roster import RosterEntry
from cluster.core.errors import MacpipeError
from cluster.core.link_limits import LINK_GAIN, LINKS_S, RELINK_S
from cluster.core.worker import WorkerInfo

log = logging.getLogger(__name__)


class LinkUpkeep:
    """Looks for better links while no request is live. What it found waits until somebody takes it.

    ``steady_epoch`` returns the epoch that serves, ``is_idle`` whether no request is live.
    """

    def __init__(
        self,
        steady_epoch: Callable[[], Epoch | None],
        is_idle: Callable[[], Awaitable[bool]],
        members: Callable[[], Iterable[RosterEntry]],
    ) -> None:
        self._steady_epoch, self._is_idle, self._members = steady_epoch, is_idle, members
        self._epoch: Epoch | None = None
        """The epoch that does not use what was found."""
        self._found = ""

    async def run(self) -> None:
        """Look every ``LINKS_S``, and ``RELINK_S`` after something was found, until cancelled."""
        while True:
            await asyncio.sleep(RELINK_S if self._found else LINKS_S)
            self._epoch, self._found = self._steady_epoch(), ""
            if self._epoch and self._has_links(self._epoch) and await self._is_idle():
                workers = {m.info.name: m.info for m in self._members() if not m.problem}
                self._found = await find_better_link(self._epoch, workers)

    @staticmethod
    def _has_links(epoch: Epoch) -> bool:
        """Return whether links of an epoch can be compared. Those of a group could only change with all its engines."""
        return not epoch.plan.is_grouped and any(stage.link for stage in epoch.stages)

    def has_better(self, epoch: Epoch) -> bool:
        """Return whether a link was found that is better than one of the epoch."""
        return bool(self._found) and self._epoch is epoch

    def take(self) -> str:
        """Return what was found, as a sentence, and forget it."""
        found, self._found = self._found, ""
        return found


async def find_better_link(epoch: Epoch, workers: Mapping[str, WorkerInfo]) -> str:
    """Return the sentence of a link that is much better than the one that an epoch uses; "" if there is none.

    ``workers`` are what the workers said last, by name. A link that was not measured before is not compared.
    """
    for (before, after), control in zip(pairwise(epoch.stages), epoch.controls[1:], strict=True):
        source = workers.get(before.worker)
        if after.link is None or source is None or not source.data_hosts:
            continue
        try:
            best = await control.measure_link(source)
        except MacpipeError as e:
            log.info("link: not measured reason=%s from=%s to=%s", e.sentence, before.worker, after.worker)
            continue
        if best.cost_s * LINK_GAIN < after.link.cost_s:
            return f"a faster network between {before.worker} and {after.worker} was found"
    return ""
