"""One cluster of four worker daemons and one coordinator, shared by all integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import make
from cluster.client import Client
from integration.daemons import Cluster

WORKERS = ("ada", "bob", "cyd", "dee")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the test's own, without daemons yet."""
    made = Cluster(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random checkpoint for each name asked of ``model``."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(models: Path) -> Path:
    return make("llama", models / "llama")


@pytest.fixture(scope="package")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four workers of these tests' own; they end with the folder's last test, since idle daemons are not free."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for name in WORKERS:
            made.worker(name)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="package")
def address(session_cluster: Cluster, llama: Path) -> str:
    """The coordinator of the session's workers, which it found over mDNS on loopback."""
    return session_cluster.serving(llama, len(WORKERS))[1]


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout_s=60) as client:
        yield client
