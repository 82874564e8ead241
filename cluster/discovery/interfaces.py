"""The network interfaces of the machine: where to announce a host, and which of a stranger's addresses to take.

It knows addresses and subnets; it opens nothing. mDNS travels over IPv4 wherever an interface has an IPv4 address, and
over IPv6 only where there is nothing else: one socket for both is refused by macOS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface

import ifaddr

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface and its addresses with their subnets, as configured."""

    name: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...]

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
    return Interface(adapter.nice_name, tuple(ip_interface(f"{text}/{ip.network_prefix}") for text, ip in pairs))


def reach(host: str, local: Iterable[Interface]) -> Reach:
    """Where and as what to announce a server that listens on ``host``, an IP address.

    Loopback stays on loopback. A wildcard goes to every other interface, with their addresses (to loopback when there
    is no other). Anything else goes to the one interface that has this address, and nowhere if none has it.
    """
    ip = ip_address(host)
    if ip.is_loopback:
        return Reach((LOOPBACK,), (host,))
    if ip.is_unspecified:
        return _everywhere(ip, [i for i in local if not i.loopback])
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


def preferred(addresses: Iterable[str], local: Iterable[Interface]) -> str:
    """The address to try: IPv4 of a subnet of ours, then IPv6, then any IPv4; loopback if that is all; else nothing."""
    networks = [a.network for i in local for a in i.addresses]

    def rank(ip: IPv4Address | IPv6Address) -> tuple[int, bool, int]:
        near = any(ip.version == n.version and ip in n for n in networks)
        if ip.is_loopback:
            return 3, False, int(ip)
        if ip.version == 6:
            return 1, not near, int(ip)
        # Self-assigned addresses are the same subnet on every cable, so a configured one is the safer bet.
        return 0 if near else 2, ip.is_link_local, int(ip)

    usable = [ip for ip in map(ip_address, addresses) if _usable(ip)]
    return str(min(usable, key=rank)) if usable else ""


def _usable(ip: IPv4Address | IPv6Address) -> bool:
    if ip.is_unspecified or ip.is_multicast:
        return False
    return not (isinstance(ip, IPv6Address) and ip.is_link_local and ip.scope_id is None)
