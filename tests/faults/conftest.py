"""One fleet behind proxies, shared by all of these tests. Each test leaves it intact."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from faults.campaign import Campaign
from faults.fleet import Fleet


@pytest.fixture(scope="package")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    if sys.platform != "linux":
        pytest.skip("needs loopback addresses beside 127.0.0.1, and /proc")
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        yield Campaign(fleet)
    finally:
        fleet.close()
