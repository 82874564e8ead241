from __future__ import annotations

from collections.abc import Iterator

import pytest

from client.scripted import Coordinator


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with Coordinator() as running:
        yield running
