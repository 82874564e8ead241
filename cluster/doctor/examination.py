"""The checks of one Mac, in the order in which they are shown."""

from __future__ import annotations

from typing import Final

from cluster.core.examination import CheckResult
from cluster.doctor.finding import Check, run_checks
from cluster.doctor.network_checks import (
    check_firewall,
    check_mdns,
    check_members,
    check_ports,
    check_routes,
    check_vpn,
)
from cluster.doctor.power_checks import check_display, check_heat, check_power, check_sleep
from cluster.doctor.readings import Readings
from cluster.doctor.state_checks import check_certificates, check_processes, check_profiles
from cluster.doctor.system_checks import check_disk, check_macos, check_memory, check_mlx
from cluster.doctor.thunderbolt_checks import check_rdma, check_thunderbolt

MAC_CHECKS: Final[dict[str, Check[Readings]]] = {
    "macOS": check_macos,
    "MLX": check_mlx,
    "memory": check_memory,
    "disk": check_disk,
    "sleep": check_sleep,
    "power": check_power,
    "heat": check_heat,
    "display": check_display,
    "connections to members": check_members,
    "mDNS": check_mdns,
    "firewall": check_firewall,
    "VPN": check_vpn,
    "routes": check_routes,
    "ports": check_ports,
    "Thunderbolt": check_thunderbolt,
    "RDMA": check_rdma,
    "certificates": check_certificates,
    "measured speed": check_profiles,
    "processes": check_processes,
}


def examine(readings: Readings) -> tuple[CheckResult, ...]:
    """Judge what was read from one Mac."""
    return run_checks(MAC_CHECKS, readings)
