"""Find the Thunderbolt ports over which this Mac can use RDMA, and where their cables lead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.core.process_groups import RdmaPort
from cluster.doctor.thunderbolt_checks import RDMA_SPEED, parse_rdma_ports, parse_speed
from cluster.platform.mac_commands import MAC_COMMANDS
from cluster.platform.macos import parse_hardware_ports, run_command

__all__ = ["find_rdma_ports", "read_rdma_ports"]


def read_rdma_ports() -> tuple[RdmaPort, ...]:
    """Return this Mac's ports; () where RDMA is not enabled, and on other systems. Takes up to some seconds."""
    if "enabled" not in run_command(*MAC_COMMANDS["rdma"]).lower():
        return ()
    names = parse_hardware_ports(run_command("networksetup", "-listallhardwareports"))
    states = parse_rdma_ports(run_command(*MAC_COMMANDS["rdma_ports"]))
    return find_rdma_ports(run_command(*MAC_COMMANDS["thunderbolt"]), names, states)


def find_rdma_ports(report: str, names: Mapping[str, str], states: Mapping[str, str]) -> tuple[RdmaPort, ...]:
    """Return the ports of ``system_profiler -json SPThunderboltDataType`` with a fast enough cable to a Mac.

    ``names`` are those of the network devices (en5: Thunderbolt 3), and ``states`` those of the RDMA devices, which are
    called as the network device of the same port. A port that is not active is left out.
    """
    devices = {name: f"rdma_{device}" for device, name in names.items()}
    try:
        found = [port for bus in json.loads(report)["SPThunderboltDataType"] for port in _ports(bus, devices)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()
    return tuple(port for port in found if states.get(port.device) == "PORT_ACTIVE")


def _ports(bus: Mapping[str, Any], devices: Mapping[str, str]) -> list[RdmaPort]:
    peers = [str(item["domain_uuid_key"]) for item in bus.get("_items", ()) if "domain_uuid_key" in item]
    port = bus.get("receptacle_1_tag", {})
    device = devices.get(f"Thunderbolt {port.get('receptacle_id_key', '')}", "")
    fast = parse_speed(str(port.get("current_speed_key", ""))) > RDMA_SPEED
    return [RdmaPort(device, str(bus["domain_uuid_key"]), peers[0])] if peers and device and fast else []
