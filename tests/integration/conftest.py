"""One cluster of four worker daemons and one coordinator for the whole session; tests load what they need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import make
from cluster.client import Client
from integration.daemons import Cluster, free_port, wait_serving

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


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[str]:
    """The coordinator of four workers, found over mDNS on loopback."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for name in WORKERS:
            cluster.worker(name)
        port = free_port()
        serve = cluster.serve(llama, "--workers", str(len(WORKERS)), "--port", str(port), "--wait", "90")
        wait_serving(f"127.0.0.1:{port}", serve)
        yield f"127.0.0.1:{port}"
    finally:
        cluster.close()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout_s=60) as client:
        yield client
