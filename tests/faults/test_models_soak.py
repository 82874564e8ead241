"""Models come and go for minutes on Macs that hold two of three: every answer is right, and no process grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from faults.models_soak import ModelsFound, ModelsSoak
from integration.daemons import Footprint


def test_growth_is_told_from_engines_that_come_and_go() -> None:
    def found(*mebibytes: int, differing: int = 0) -> ModelsFound:
        seen = [Footprint(size * 2**20, 9, 40) for size in mebibytes]
        return ModelsFound(footprints={"hal": seen}, differing=differing)

    steady = (100, 200, *(120, 240) * 7)
    assert found(*steady).good
    assert not found(*steady, differing=1).good
    assert not found(*steady[:12], 400, 500, 600, 600).good


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_models_come_and_go(tmp_path: Path) -> None:
    soak = ModelsSoak(tmp_path)
    try:
        found = soak.minutes(3)
    finally:
        soak.close()
    print(json.dumps(found.facts()))
    assert found.good, found.facts()
    assert min(found.answers, found.left, found.evictions) > 0
