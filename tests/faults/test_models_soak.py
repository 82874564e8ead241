"""Models come and go for minutes on Macs that hold two of three: every answer is right, and no process grows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from faults.models_soak import ModelsFound, ModelsSoak, Seen
from integration.daemons import Footprint


def found(*mebibytes: int, files: Sequence[int] = (40,), differing: int = 0, code: int = 0) -> ModelsFound:
    """What was found of a process with so much memory of its own; ``code`` MiB of code come with each look."""

    def look(number: int, own: int) -> Seen:
        return Seen(Footprint((own + code * number) * 2**20, 9, files[number % len(files)], own * 2**20), 2)

    return ModelsFound(seen={"hal": [look(i, size) for i, size in enumerate(mebibytes)]}, differing=differing)


def test_growth_is_told_from_models_that_come_and_go() -> None:
    steady = (100, 160, *(120, 140) * 7)
    assert found(*steady, files=(40, 44), code=5).good
    assert not found(*steady, differing=1).good
    assert found(*steady[:12], 400, 500, 600, 600).grown() == ["hal: memory"]
    assert found(*steady, files=range(0, 32, 2)).grown() == ["hal: files"]


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
    assert not found.grown(1.1), found.facts()  # 3 % only in a longer run: caches still fill
    assert not found.differing + len(found.failed), found.facts()
    assert min(found.answers, found.left, found.evictions) > 0
