"""Keeps a long benchmark's figures in a file as they come, so that a run which fails or is stopped loses none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from figures import as_facts, print_figures
from pipeline_rounds import Rounds

LOG_LINES = 200
"""How many of the coordinator's last log lines are kept where it had to recover, or where the bench failed."""


@dataclass
class Record:
    """What has been found so far, in a file too if there is one. ``most_s`` is the time for all rounds.

    ``compare`` returns the ratios of medians, both by name.
    """

    file: Path | None
    most_s: float
    compare: Callable[[Mapping[str, float]], dict[str, float]]
    facts: dict[str, object] = field(default_factory=dict)
    log: Path | None = None
    """The coordinator's, once it runs."""

    def __post_init__(self) -> None:
        self.rounds = Rounds(self.keep, self.most_s)

    @property
    def ratios(self) -> dict[str, float]:
        return self.compare(self.rounds.medians)

    def keep(self) -> None:
        """Write the file anew."""
        if self.file:
            packed = json.dumps(as_facts("medians", self.rounds.figures, self.ratios, self.facts))
            partial = self.file.with_suffix(".partial")
            partial.write_text(packed + "\n", encoding="utf-8")
            partial.replace(self.file)

    def keep_log(self) -> None:
        """Keep the end of the coordinator's log: it says why it had to recover."""
        if self.log and self.log.exists():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            self.facts["coordinator_log"] = lines[-LOG_LINES:]

    def fill(self, measure: Callable[[ExitStack], None], *, as_json: bool) -> int:
        """Measure, then print what was found, also if it failed midway. Return the exit code."""
        try:
            with ExitStack() as stack:
                try:
                    measure(stack)
                except Exception:
                    self.keep_log()
                    raise
        except Exception as error:
            self.facts["failed"] = f"{type(error).__name__}: {error}"
            print(f"failed: {self.facts['failed']}", file=sys.stderr, flush=True)
        self.keep()
        print_figures("medians", self.rounds.figures, self.ratios, as_json, self.facts)
        return 1 if "failed" in self.facts else 0
