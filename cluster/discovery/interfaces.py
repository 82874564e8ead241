"""The network interfaces of the machine: where to announce a host, and which of a stranger's addresses to take.

It knows addresses and subnets; it opens nothing. mDNS travels over IPv4 wherever an interface has an IPv4 address, and
over IPv6 only where there is nothing else: one socket for both is refused by macOS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface

import ifaddr

from cluster.core.errors import InvalidOption
from cluster.platform.macos import hardware_ports

LOOPBACK = "127.0.0.1"
_VPN = ("utun", "tun", "tap", "wg", "ppp", "ipsec", "tailscale", "zt", "nordlynx")
"""How interfaces of tunnels are called, on macOS and Linux."""
_WIFI = ("wl", "awdl", "llw", "ath")


class Medium(IntEnum):
    """What carries an interface's packets, the best first. A tunnel is taken only by those who name it."""

    WIRED = 0
    WIFI = 1
    VPN = 2


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface and its addresses with their subnets, as configured."""

    name: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    port: str = ""
    """The hardware behind it, where the system names it (macOS calls Ethernet and Wi-Fi alike ``en``)."""

    @property
    def medium(self) -> Medium:
        if self.name.startswith(_VPN):
            return Medium.VPN
        return Medium.WIFI if self.port == "Wi-Fi" or self.name.startswith(_WIFI) else Medium.WIRED

    @property
    def loopback(self) -> bool:
        return any(a.ip.is_loopback for a in self.addresses)


@dataclass(frozen=True, slots=True)
class Reach:
    """``senders``: own addresses whose interfaces carry the announcement; ``addresses``: what it names."""

    senders: tuple[str, ...]
    addresses: tuple[str, ...]


def interfaces() -> tuple[Interface, ...]:
    """Read from the system; empty when it has none, or won't say."""
    try:
        adapters = list(ifaddr.get_adapters())
    except OSError:
        return ()
    return tuple(sorted((_interface(adapter) for adapter in adapters), key=lambda i: i.name))


def _interface(adapter: ifaddr.Adapter) -> Interface:
    ips = (ip.ip if isinstance(ip.ip, str) else ip.ip[0] for ip in adapter.ips)
    pairs = zip(ips, adapter.ips, strict=True)
    addresses = tuple(ip_interface(f"{text}/{ip.network_prefix}") for text, ip in pairs)
    return Interface(adapter.nice_name, addresses, hardware_ports().get(adapter.nice_name, ""))


def interface_of(host: str) -> str:
    """The interface that has this address; empty for a wildcard, and where none has it."""
    return next((i.name for i in interfaces() if any(str(a.ip) == host for a in i.addresses)), "")


def address_on(name: str, local: Iterable[Interface]) -> str:
    """The address to listen on for a person who names an interface; raises InvalidOption with those there are."""
    known = {i.name: i for i in local}
    if name not in known:
        named = ", ".join(sorted(known)) or "none"
        raise InvalidOption(f"--interface {name}: there is no such interface; there are {named}", field="interface")
    ips = [a.ip for a in known[name].addresses]
    usable = sorted((ip for ip in ips if _usable(ip)), key=lambda ip: (ip.version, ip.is_link_local))
    if not usable:
        raise InvalidOption(f"--interface {name} has no address now", field="interface")
    return str(usable[0])


def best_address(local: Iterable[Interface]) -> str:
    """Where others of the network reach this machine best: wired before Wi-Fi, and no tunnel; else loopback."""
    outer = [i for i in local if not i.loopback and i.medium is not Medium.VPN]
    found = [
        (i.medium, a.ip.version, a.ip.is_link_local, str(a.ip)) for i in outer for a in i.addresses if _usable(a.ip)
    ]
    return min(found)[3] if found else LOOPBACK


def reach(host: str, local: Iterable[Interface]) -> Reach:
    """Where and as what to announce a server that listens on ``host``, an IP address.

    Loopback stays on loopback. A wildcard goes to every other interface, with their addresses (to loopback when there
    is no other). Anything else goes to the one interface that has this address, and nowhere if none has it.
    """
    ip = ip_address(host)
    if ip.is_loopback:
        return Reach((LOOPBACK,), (host,))
    if ip.is_unspecified:
        return _everywhere(ip, [i for i in local if not i.loopback and i.medium is not Medium.VPN])
    own = [i for i in local if any(a.ip == ip for a in i.addresses)]
    if not own:
        return Reach((), ())
    return Reach((host,) if ip.version == 4 else _senders(own) or (host,), (host,))


def _everywhere(wildcard: IPv4Address | IPv6Address, outer: list[Interface]) -> Reach:
    ips = [a.ip for i in outer for a in i.addresses if wildcard.version == 6 or a.version == 4]
    # A link-local IPv6 address means nothing without the reader's own scope.
    named = tuple(str(ip) for ip in ips if ip.version == 4 or not ip.is_link_local)
    if not named:
        return Reach((LOOPBACK,), (LOOPBACK,))
    return Reach(_senders(outer) or named, named)


def _senders(chosen: Iterable[Interface]) -> tuple[str, ...]:
    return tuple(str(a.ip) for i in chosen for a in i.addresses if a.version == 4)


def preferred_address(addresses: Iterable[str], local: Iterable[Interface]) -> str:
    """The address to try: IPv4 of a subnet of ours, then IPv6, then any IPv4; loopback if that is all; else nothing.

    Of several subnets a wired one's goes before Wi-Fi's, and that before a tunnel's.
    """
    networks = [(a.network, i.medium) for i in local for a in i.addresses]

    def rank(ip: IPv4Address | IPv6Address) -> tuple[int, int, bool, int]:
        media = [medium for n, medium in networks if ip.version == n.version and ip in n]
        near, medium = bool(media), min(media, default=Medium.WIRED)
        if ip.is_loopback:
            return 4, 0, False, int(ip)
        if medium is Medium.VPN:
            return 3, 0, False, int(ip)
        if ip.version == 6:
            return 1, medium, not near, int(ip)
        # Self-assigned addresses are the same subnet on every cable, so a configured one is the safer bet.
        return 0 if near else 2, medium, ip.is_link_local, int(ip)

    usable = [ip for ip in map(ip_address, addresses) if _usable(ip)]
    return str(min(usable, key=rank)) if usable else ""


def _usable(ip: IPv4Address | IPv6Address) -> bool:
    if ip.is_unspecified or ip.is_multicast:
        return False
    return not (isinstance(ip, IPv6Address) and ip.is_link_local and ip.scope_id is None)
