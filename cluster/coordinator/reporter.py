"""Define how a coordinator reports to people: on one load to its caller, and on all events to the operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Protocol

from cluster.core.plan import LoadProgress, Plan
from cluster.core.text import count_in_words
from cluster.core.worker import WorkerInfo


class LoadReporter(Protocol):
    """Receives the progress of a load. Called on the coordinator's event loop; must not block."""

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        """Report the usable workers found so far, and those that are drained. Called whenever they change."""

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None: ...


class Reporter(LoadReporter, Protocol):
    """Receives all events that the operator should see."""

    def serving(self, addresses: Sequence[str], plan: Plan, http: str, names: Sequence[str] = ()) -> None:
        """Report that a token passed every stage.

        Requests go to any of ``addresses``, the first of which is this Mac's own, and to the URL ``http`` unless "".
        ``names`` are those of all models, the one with the plan first; none if there is one model alone.
        """

    def problem(self, sentence: str) -> None:
        """Report a problem. The sentence says whether serving continues."""


class BothReporters:
    """Passes the progress of a load to two reporters."""

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


class LoadWatch:
    """Keeps in a sentence what a load does or waits for. ``doing`` has a place for the model's name."""

    def __init__(self, model: str = "", doing: str = "{}") -> None:
        self.model = PurePath(model).name
        self._what = doing.format(self.model)
        self.sentence = self._what

    def wait_for(self, model: str) -> None:
        """Take note that another model is loaded first."""
        self.sentence = f"{self._what}: waiting until {model} is loaded"

    def go_on(self) -> None:
        """Take note that nothing is waited for."""
        self.sentence = self._what

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        """Take note of the workers found so far."""
        if not found or (wanted and len(found) < wanted):
            names = ", ".join(worker.name for worker in found) or "none yet"
            self.sentence = f"{self._what}: waiting for {count_in_words(wanted or 1, 'worker')}, found {names}"

    def planned(self, plan: Plan) -> None:
        """Take note that nothing is waited for."""
        self.go_on()

    def progress(self, progress: LoadProgress) -> None:
        """Ignore it: the Macs report it themselves."""
