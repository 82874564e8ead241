"""The table of fuzz targets. Every decoder of foreign bytes is in it."""

from __future__ import annotations

from importlib.util import find_spec

from fuzz.targets import asked, kept, models, network, prefixes, wire
from fuzz.targets.target import Prepared, Target

__all__ = ["TARGETS", "Prepared", "Target"]

_ROOMS = [wire, kept, prefixes, asked, models, network]
if find_spec("cluster.security.tokens"):
    from fuzz.targets import security

    _ROOMS.append(security)
TARGETS = {t.name: t for room in _ROOMS for t in room.TARGETS}
