"""Which ports of a Mac carry RDMA, from what its commands wrote."""

from __future__ import annotations

import json

import pytest

from cluster.core.process_groups import RdmaPort
from cluster.doctor.rdma_ports import find_rdma_ports, read_rdma_ports
from cluster.doctor.thunderbolt_checks import parse_rdma_ports
from cluster.platform.macos import parse_hardware_ports
from doctor.recorded import RDMA_PORTS, thunderbolt

HARDWARE = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 00:00:00:00:00:01

Hardware Port: Thunderbolt 2
Device: en2
Ethernet Address: 00:00:00:00:00:02

Hardware Port: Thunderbolt 3
Device: en3
Ethernet Address: 00:00:00:00:00:03
"""
OWN = "7F158861-C131-4D0D-83B6-CA50EF76C32B"
PEER = "0C4E5D2F-7D0E-4A8B-9E2C-1B2D3C4E5F60"


def connected(speed: str = "Up to 80 Gb/s", peer: str = PEER) -> str:
    report = json.loads(thunderbolt(speed))
    report["SPThunderboltDataType"][0]["_items"][0]["domain_uuid_key"] = peer
    return json.dumps(report)


def find(report: str, states: str = RDMA_PORTS) -> tuple[RdmaPort, ...]:
    return find_rdma_ports(report, parse_hardware_ports(HARDWARE), parse_rdma_ports(states))


def test_an_active_port_tells_both_ends_of_its_cable() -> None:
    assert find(connected()) == (RdmaPort("rdma_en3", OWN, PEER),)


@pytest.mark.parametrize(
    "report", ["", "{}", "[]", connected("Up to 40 Gb/s"), thunderbolt("Up to 80 Gb/s"), '{"SPThunderboltDataType": 1}']
)
def test_slow_links_and_what_is_no_mac_are_left_out(report: str) -> None:
    """Over Thunderbolt 4 programs crash; a device without an id of its own is no Mac."""
    assert find(report) == ()


def test_a_port_that_is_down_is_left_out() -> None:
    assert find(connected(), RDMA_PORTS.replace("PORT_ACTIVE", "PORT_DOWN")) == ()
    assert find_rdma_ports(connected(), {}, parse_rdma_ports(RDMA_PORTS)) == ()


def test_without_the_commands_of_macos_there_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read_rdma_ports() == ()
