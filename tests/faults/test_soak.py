"""Ten thousand clients connect and leave: no process keeps memory, files or threads of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from faults.soak import Found, Soak
from integration.daemons import Footprint

CYCLES = 10_000


def seen(resident: int, files: int, threads: int = 9) -> Footprint:
    return Footprint(resident, threads, files, resident)


def test_growth_is_told_from_what_is_flat() -> None:
    def found(*footprints: Footprint) -> Found:
        return Found(footprints={"serve": list(footprints)})

    warm = seen(2**30, 40)
    assert found(seen(1, 1), warm, warm, seen(2**30 + 2**24, 44)).flat
    assert not found(seen(1, 1), warm, warm, seen(2**30 + 2**28, 40)).flat
    assert not found(seen(1, 1), warm, warm, seen(2**30, 140)).flat
    assert not found(seen(1, 1), warm, warm, seen(2**30, 40, 90)).flat


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_ten_thousand_clients_that_go_leave_nothing(tmp_path: Path) -> None:
    soak = Soak(tmp_path)
    try:
        found = soak.cycles(CYCLES)
    finally:
        soak.close()
    print(json.dumps(found.facts()))
    assert found.cycles == CYCLES
    assert found.flat, found.facts()
