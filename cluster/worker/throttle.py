"""A worker that is made to look slower, for tests: it sleeps after each step in proportion to what the step took."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Throttle:
    """Steps take ``factor`` times as long; 1 changes nothing."""

    factor: float = 1.0

    def stretch(self, seconds: float) -> None:
        """Call after a step that took so long."""
        if self.factor > 1.0:
            time.sleep(seconds * (self.factor - 1.0))
