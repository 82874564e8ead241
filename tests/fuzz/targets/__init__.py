"""The table of targets: whatever reads foreign bytes is in it."""

from __future__ import annotations

from fuzz.targets import asked, kept, models, network, wire
from fuzz.targets.target import Prepared, Target

__all__ = ["TARGETS", "Prepared", "Target"]

TARGETS = {t.name: t for room in (wire, kept, asked, models, network) for t in room.TARGETS}
