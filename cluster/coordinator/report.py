"""What a coordinator tells the person who started it, while it finds workers and loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.types import LoadProgress, Plan, WorkerFacts


class Report(Protocol):
    """Called on the coordinator's event loop; must not block."""

    def waiting(self, found: Sequence[WorkerFacts], wanted: int | None) -> None:
        """Who is there so far; called whenever that changes."""

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None: ...

    def serving(self, address: str, plan: Plan) -> None:
        """A token has gone through every stage; requests are taken at ``address``."""

    def problem(self, sentence: str) -> None:
        """Something a person should know; serving goes on or is over, as the sentence says."""


class Silent:
    """A report to nobody, for loads that a client asked for and follows itself."""

    def waiting(self, found: Sequence[WorkerFacts], wanted: int | None) -> None: ...

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None: ...

    def serving(self, address: str, plan: Plan) -> None: ...

    def problem(self, sentence: str) -> None: ...
