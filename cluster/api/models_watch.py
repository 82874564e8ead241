"""Keep a coordinator's catalog as its file of models says, and load the models that are pinned.

After a restart, also load those that workers still hold, so that their answers can be resumed. After a take-over, load
also those that the leader before had loaded although they are not configured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.models_file import ModelsFile
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import ModelEntry
from cluster.core.errors import InvalidOption, LoadEnded, MacpipeError, NotServing
from cluster.core.load_limits import FAILED_RETRY_S, MAX_FAILED_RETRY_S

log = logging.getLogger(__name__)
POLL_S: Final = 2.0
"""How often the file is read: a person who saves it sees the effect before looking."""


@dataclass(frozen=True, slots=True)
class _FailedPin:
    """Why a pinned model was not loaded, and until when that is not tried again."""

    error: MacpipeError
    retry_s: float
    until: float


class ModelsWatch:
    """Reads ``file`` again and again; None if the models come from the command line.

    ``on_demand`` makes room for the models that are pinned. A file that is wrong changes nothing: what was served goes
    on, and status says what is wrong.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        file: ModelsFile | None,
        report: Reporter,
        on_demand: OnDemand,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_room_and_load = on_demand.load
        self._coordinator, self._file, self._report = coordinator, file, report
        self._pinned: list[str] = []
        """Models that are still to be loaded."""
        self._clock = clock
        self._failures: dict[str, _FailedPin] = {}
        """Of pinned models, which are loaded again later."""

    async def load_pinned(self) -> None:
        """Load the pinned models, and those that workers still hold, one after the other. Report what cannot be."""
        self._note_pinned()
        await self._load_noted()

    async def run(self) -> None:
        """Take up changes of the file until cancelled."""
        while self._file or self._pinned:
            await anyio.sleep(POLL_S)
            if self._file:
                await self._take_up(self._file)
            await self._load_noted()

    async def _take_up(self, file: ModelsFile) -> None:
        try:
            entries = await anyio.to_thread.run_sync(file.read_changed)
            if entries is None:
                return
            catalog = ModelCatalog(entries)
        except InvalidOption as e:
            self._say(f"the models stay as they were: {e.sentence}")
            return
        self._coordinator.adopt_catalog(catalog)
        self._say("")
        log.info("models: changed file=%s models=%d", file.path, len(entries))
        self._note_pinned()

    def _say(self, problem: str) -> None:
        self._coordinator.catalog_problem = problem
        self._coordinator.changed.set()
        if problem:
            self._report.problem(problem)

    def _note_pinned(self) -> None:
        heirs, is_expected = self._coordinator.inherited.heirs, self._coordinator.deployments.is_expected
        wanted = (one for one in self._coordinator.catalog if one.pin or one.name in heirs or is_expected(one.name))
        self._failures.clear()
        self._pinned = [entry.name for entry in wanted if not self._is_loaded(entry.name)]

    def _is_loaded(self, name: str) -> bool:
        deployment = self._coordinator.deployments.get(name)
        return deployment is not None and deployment.model_info is not None

    async def _load_noted(self) -> None:
        """Load what was noted. What must wait for another load, or has failed, stays noted if it is pinned."""
        for name in tuple(self._pinned):
            entry = self._coordinator.catalog.get(name)
            if entry and not self._is_loaded(name):
                failure = self._failures.get(name)
                if failure and self._clock() < failure.until:
                    continue
                try:
                    await self._load(entry)
                except LoadEnded as e:
                    log.info("models: pinned model not loaded reason=%s model=%s", e.sentence, name)
                except NotServing:
                    return
                except MacpipeError as e:
                    self._note_failure(name, e)
                    if entry.pin:
                        continue
            self._failures.pop(name, None)
            self._pinned.remove(name)
            self._coordinator.deployments.end_expecting(name)

    async def _load(self, entry: ModelEntry) -> None:
        """Load a model. What workers hold from before a restart needs no room."""
        inherited = entry.name in self._coordinator.inherited.heirs
        load = self._coordinator.load if inherited else self._make_room_and_load
        await load(entry.order, name=entry.name)

    def _note_failure(self, name: str, error: MacpipeError) -> None:
        """Wait twice as long after each further failure. Report each kind of error once."""
        before = self._failures.get(name)
        retry_s = min(2 * before.retry_s, MAX_FAILED_RETRY_S) if before else FAILED_RETRY_S
        self._failures[name] = _FailedPin(error, retry_s, self._clock() + retry_s)
        if before is None or type(before.error) is not type(error):
            self._report.problem(f"the model {name} is not loaded: {error.sentence}")
