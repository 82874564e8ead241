"""Checks of Thunderbolt links and of RDMA over them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from cluster.core.examination import Finding, Severity
from cluster.doctor.readings import Readings

RDMA_MACOS: Final = (26, 2)
RDMA_SPEED: Final = 40
"""RDMA needs a link faster than this, in Gb/s: Thunderbolt 4 lists RDMA devices too and crashes (exo issue 1813)."""
STUDIOS: Final = ("Mac15,14", "Mac16,9")
"""Mac Studios with Thunderbolt 5, as hw.model names them."""

_SPEED: Final = re.compile(r"(\d{1,4})\s*Gb/s")
_DEVICE: Final = re.compile(r"^\s*(rdma_en\d{1,3})\s", re.MULTILINE)
_PORT: Final = re.compile(r"hca_id:\s*(\S{1,40})|state:\s*(PORT_\w{1,20})")


@dataclass(frozen=True, slots=True)
class ThunderboltLink:
    """A port with something connected: the port's number on the Mac, Gb/s, and the names of what is there."""

    port: str
    speed: int
    devices: tuple[str, ...]
    macs: bool
    """Whether one of them is a Mac."""


def parse_thunderbolt(report: str) -> tuple[ThunderboltLink, ...] | None:
    """Parse ``system_profiler -json SPThunderboltDataType``; None if it is not such a report."""
    try:
        buses = json.loads(report)["SPThunderboltDataType"]
        return tuple(link for bus in buses for link in _links(bus))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _links(bus: dict[str, Any]) -> list[ThunderboltLink]:
    devices = [item for item in bus.get("_items", ()) if isinstance(item, dict)]
    names = tuple(str(item.get("_name", "")) for item in devices)
    macs = any("mac" in str(item.get("device_name_key", "")).lower() for item in devices)
    ports = [port for name, port in sorted(bus.items()) if name.startswith("receptacle_") and isinstance(port, dict)]
    speeds = [
        (str(port.get("receptacle_id_key", "")), parse_speed(str(port.get("current_speed_key", "")))) for port in ports
    ]
    return [ThunderboltLink(number, speed, names, macs) for number, speed in speeds if speed and devices]


def parse_speed(text: str) -> int:
    """Return the Gb/s of a port's current speed; 0 if it has none."""
    found = _SPEED.search(text)
    return int(found[1]) if found else 0


def parse_rdma_ports(report: str) -> dict[str, str]:
    """Parse ``ibv_devinfo``: the state of each device's port, such as ``PORT_ACTIVE``."""
    states: dict[str, str] = {}
    device = ""
    for name, state in _PORT.findall(report):
        device = name or device
        if state and device:
            states[device] = state
    return states


def check_thunderbolt(readings: Readings) -> list[Finding] | None:
    """Find links between Macs that are slower than Thunderbolt 4, as through an old or charging cable."""
    links = parse_thunderbolt(readings.outputs.thunderbolt)
    if links is None:
        return None
    return [
        Finding(
            Severity.WARNING,
            f"the Thunderbolt link of port {link.port} to {', '.join(link.devices)} runs at {link.speed} Gb/s",
            "Activations and weights take at least twice as long as over 40 Gb/s.",
            "use a cable that is marked for Thunderbolt 4 or 5",
        )
        for link in links
        if link.macs and link.speed < RDMA_SPEED
    ]


def check_rdma(readings: Readings) -> list[Finding] | None:
    """Say whether RDMA can be used, and what is missing. Pipelines do not need it."""
    links = parse_thunderbolt(readings.outputs.thunderbolt)
    if links is None or not readings.macos:
        return None
    if not any(link.macs and link.speed > RDMA_SPEED for link in links):
        return _check_useless_devices(readings)
    if readings.macos < RDMA_MACOS:
        what = f"RDMA needs macOS 26.2, and this Mac has {'.'.join(map(str, readings.macos))}"
        return [Finding(Severity.NOTE, what, _WHY, "softwareupdate --list")]
    if "enabled" not in readings.outputs.rdma.lower():
        remedy = "start the Mac in Recovery, open Terminal there and run `rdma_ctl enable`"
        return [Finding(Severity.NOTE, "RDMA over Thunderbolt 5 is not enabled", _WHY, remedy)]
    return _check_ports(readings)


_WHY: Final = "Macs that share each layer exchange data many times a token; without RDMA they are slow."


def _check_useless_devices(readings: Readings) -> list[Finding]:
    devices = _DEVICE.findall(readings.outputs.rdma_devices)
    if not devices:
        return []
    what = f"macOS lists {', '.join(devices)}, but no Mac is connected at more than {RDMA_SPEED} Gb/s"
    return [Finding(Severity.NOTE, what, "RDMA works over Thunderbolt 5 only; on slower links programs crash.")]


def _check_ports(readings: Readings) -> list[Finding]:
    states = parse_rdma_ports(readings.outputs.rdma_ports)
    active = [device for device, state in states.items() if state == "PORT_ACTIVE"]
    if not active:
        why = "No device can be used. Ports can stay down after they idled or after a restart."
        return [Finding(Severity.WARNING, "RDMA is enabled, but no port is active", why, "ibv_devinfo | grep state")]
    if "rdma_en2" in active and readings.outputs.model.strip() in STUDIOS:
        why = "On a Mac Studio, the port beside Ethernet does not carry RDMA."
        return [Finding(Severity.WARNING, "RDMA would use rdma_en2", why, "move the cable to another port")]
    return []
