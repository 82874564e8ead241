"""Checks of the network: whether members can be reached, mDNS, the firewall, VPNs, routes and ports."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from cluster.core.examination import Finding, Severity
from cluster.core.text import format_address
from cluster.discovery.interfaces import Medium
from cluster.doctor.readings import MemberConnection, Reached, Readings

SETTINGS_PATH: Final = "System Settings > Privacy & Security > Local Network"
_FIREWALL: Final = re.compile(r"\(State = (\d)\)")
_VPN: Final = re.compile(r'^\*\s*\(Connected\)[^"\n]{0,200}"([^"\n]{1,100})"', re.MULTILINE)
_DEFAULT_ROUTE: Final = re.compile(r"^default\s+\S+\s+\S+\s+(\S+)", re.MULTILINE)


def check_members(readings: Readings) -> list[Finding] | None:
    """Find members to which no connection can be made, and say which permission or program is in the way."""
    if not readings.connections:
        return None
    blocked = _blocked(readings)
    if blocked:
        others = [one for one in readings.connections if one not in blocked]
        return [_explain_permission(blocked), *_explain_failures(others)]
    return _explain_failures(readings.connections)


def leave_out_failures(readings: Readings) -> Readings:
    """Return the readings without failed connections, except those that macOS blocked: only this Mac knows of that."""
    blocked = _blocked(readings)
    kept = tuple(one for one in readings.connections if one.reached is Reached.CONNECTED or one in blocked)
    return replace(readings, connections=kept)


def _blocked(readings: Readings) -> list[MemberConnection]:
    """Return the connections that this Mac's permission for the local network does not allow."""
    if not readings.is_mac:
        return []
    return [one for one in readings.connections if one.reached is Reached.NO_ROUTE and is_local(one.host)]


def is_local(host: str) -> bool:
    """Return whether ``host`` is an address, or a name, of a local network but not this machine's own."""
    try:
        ip = ip_address(host)
    except ValueError:
        return host.endswith(".local")
    return (ip.is_private or ip.is_link_local) and not ip.is_loopback


def _explain_permission(blocked: list[MemberConnection]) -> Finding:
    named = ", ".join(f"{one.name} ({format_address(one.host, one.port)})" for one in blocked)
    what = f"macOS blocks connections to {named}: no route to host (errno 65)"
    why = (
        "Since macOS 15, each program needs permission for the local network. A program that launchd starts does not"
        " inherit Terminal's."
    )
    remedy = f"turn on your terminal or Python in {SETTINGS_PATH}; if it is on, turn it off and on again"
    return Finding(Severity.PROBLEM, what, why, remedy)


def _explain_failures(connections: list[MemberConnection] | tuple[MemberConnection, ...]) -> list[Finding]:
    failed = [one for one in connections if one.reached is not Reached.CONNECTED]
    return [
        Finding(
            Severity.PROBLEM,
            f"no connection to {one.name} at {format_address(one.host, one.port)}: {one.reached}",
            _WHY_FAILED[one.reached],
            f"nc -vz {one.host} {one.port}",
        )
        for one in failed
    ]


_WHY_FAILED: Final = {
    Reached.REFUSED: "The Mac is there, but macpipe does not run on it, or listens on another address.",
    Reached.TIMED_OUT: "The Mac is off or asleep, or a firewall drops the connection.",
    Reached.NO_ROUTE: "The Mac is off, or on another network than this one.",
    Reached.UNKNOWN_HOST: "The name has no address: it is misspelled, or that Mac is not on this network.",
    Reached.FAILED: "The network of this Mac is down, or it has no address.",
}


def check_mdns(readings: Readings) -> list[Finding] | None:
    """Find a Mac that cannot send or hear announcements."""
    if readings.multicast is None:
        return None
    usable = [one for one in readings.interfaces if one.outer and one.addresses]
    if not usable:
        why = "Other Macs cannot reach this one, nor this one them."
        return [
            Finding(Severity.PROBLEM, "this Mac has no network but loopback", why, "networksetup -listallhardwareports")
        ]
    if readings.multicast:
        return []
    why = "Macs find each other by mDNS, on UDP port 5353."
    return [Finding(Severity.WARNING, "multicast cannot be used", why, "name the coordinator: --coordinator HOST:PORT")]


def check_firewall(readings: Readings) -> list[Finding] | None:
    """Find a firewall that blocks, or may block, connections to a worker or coordinator."""
    state = _FIREWALL.search(readings.outputs.firewall)
    if state is None:
        return None
    program = "/usr/libexec/ApplicationFirewall/socketfilterfw"
    if state[1] == "2":
        why = "Nobody can connect to a worker or coordinator on this Mac."
        return [
            Finding(
                Severity.PROBLEM,
                "the firewall blocks all incoming connections",
                why,
                f"sudo {program} --setblockall off",
            )
        ]
    if state[1] == "1":
        why = "It may ask, or silently refuse, when another Mac connects to Python."
        remedy = f'sudo {program} --add "$(which python3)"; sudo {program} --unblockapp "$(which python3)"'
        return [Finding(Severity.NOTE, "the firewall is on", why, remedy)]
    return []


def check_vpn(readings: Readings) -> list[Finding] | None:
    """Find a VPN that may carry or block what Macs send each other."""
    if not readings.outputs.vpn and readings.is_mac:
        return None
    services = _VPN.findall(readings.outputs.vpn)
    tunnels = [
        one.name
        for one in readings.interfaces
        if one.medium is Medium.VPN and any(a.version == 4 for a in one.addresses)
    ]
    if not (services or tunnels):
        return []
    what = f"a VPN is connected: {', '.join(services or tunnels)}"
    why = "VPNs often block mDNS and local addresses, or send them through the tunnel."
    stop = f"scutil --nc stop '{services[0]}'" if services else f"disconnect {tunnels[0]}"
    return [Finding(Severity.NOTE, what, why, f"if Macs are not found: {stop}")]


def check_routes(readings: Readings) -> list[Finding] | None:
    """Find a Thunderbolt bridge that has become the way to the internet."""
    routes = _DEFAULT_ROUTE.findall(readings.outputs.routes)
    if not routes:
        return None
    if not routes[0].startswith("bridge"):
        return []
    what = f"the default route goes through {routes[0]}, the Thunderbolt bridge"
    why = "The bridge took an address from another Mac, so the internet and other networks are out of reach."
    return [Finding(Severity.WARNING, what, why, "networksetup -ordernetworkservices lists and orders the services")]


def check_ports(readings: Readings) -> list[Finding]:
    """Find another program on the coordinator's default ports."""
    if any(one.module == "serve" for one in readings.processes or ()):
        return []
    return [
        Finding(
            Severity.NOTE,
            f"another program listens on port {port}",
            "`macpipe serve` uses this port by default.",
            f"lsof -nP -iTCP:{port} -sTCP:LISTEN, or serve on another one with --port and --http",
        )
        for port in readings.busy_ports
    ]
