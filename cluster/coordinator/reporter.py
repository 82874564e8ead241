"""What a coordinator tells people: whoever asked for a load follows it, whoever started it learns of everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.core.plan import LoadProgress, Plan
from cluster.core.worker import WorkerInfo


class LoadReporter(Protocol):
    """How a load goes. Called on the coordinator's event loop; must not block."""

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        """Who is there so far; called whenever that changes."""

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None: ...


class Reporter(LoadReporter, Protocol):
    """Everything that whoever started the coordinator should see."""

    def serving(self, address: str, plan: Plan, http: str) -> None:
        """A token has gone through every stage; requests are taken at ``address``, and at the URL ``http`` if any."""

    def problem(self, sentence: str) -> None:
        """Something a person should know; serving goes on or is over, as the sentence says."""


class BothReporters:
    """Two reports of one load."""

    def __init__(self, first: LoadReporter, second: LoadReporter) -> None:
        self._reports = (first, second)

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        for report in self._reports:
            report.waiting(found, wanted)

    def planned(self, plan: Plan) -> None:
        for report in self._reports:
            report.planned(plan)

    def progress(self, progress: LoadProgress) -> None:
        for report in self._reports:
            report.progress(progress)
