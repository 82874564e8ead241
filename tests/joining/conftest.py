"""A cluster in this process with an open join port on loopback, and Macs that join it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.joining.client import JoinOrder
from cluster.joining.join_port import admit_macs
from cluster.security.admission import Admission
from cluster.security.cluster_creation import create_cluster
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.roles import Role

IDS = {Role.COORDINATOR: "c" * 16, Role.WORKER: "a" * 16, Role.ADMIN: "d" * 16}


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    made = ClusterFolder(tmp_path / "leader", "lab")
    create_cluster(made, "mac-1", IDS)
    return made


@pytest.fixture
def admission(folder: ClusterFolder) -> Admission:
    return Admission(folder)


@pytest.fixture
async def address(folder: ClusterFolder, caplog: pytest.LogCaptureFixture) -> AsyncIterator[str]:
    """The open join port; at the end nothing that was logged may be a secret."""
    caplog.set_level(logging.DEBUG, "cluster")
    async with admit_macs(folder, "127.0.0.1", 0) as where:
        yield where


class Mac:
    """A machine: its state folder, name and id."""

    def __init__(self, home: Path, number: int) -> None:
        self.home, self.name, self.id = home / f"mac-{number}", f"mac-{number}", f"{number:016x}"
        self.number = number

    def order(self, admission: Admission, peer: str, role: Role = Role.WORKER, **more: object) -> JoinOrder:
        token = admission.tokens.issue(admission.authority.fingerprint, role)
        return JoinOrder(self.home, token, self.id, self.name, peer, **more)  # type: ignore[arg-type]


@pytest.fixture
def mac(tmp_path: Path) -> Mac:
    return Mac(tmp_path, 2)
