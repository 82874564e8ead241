"""The table of cost targets. Every public entry is in it."""

from __future__ import annotations

from collections.abc import Mapping

from fuzz.cost import answers, grammars, http, local, models, rpc
from fuzz.cost.target import CostTarget

TARGETS: Mapping[str, CostTarget] = {
    t.name: t for room in (http, rpc, answers, grammars, models, local) for t in room.TARGETS
}
