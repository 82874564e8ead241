"""Slow a worker down for tests: sleep after each step in proportion to its duration."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Throttle:
    """Steps take ``factor`` times as long; 1 changes nothing."""

    factor: float = 1.0

    def stretch(self, seconds: float) -> None:
        """Sleep after a step that took ``seconds``."""
        if self.factor > 1.0:
            time.sleep(seconds * (self.factor - 1.0))
