"""The network interfaces of the machine: where to announce a host, and which of a peer's addresses to use.

It knows addresses and subnets; it opens nothing. mDNS uses IPv4 on every interface with an IPv4 address, and IPv6 only
where there is no IPv4: macOS refuses one socket for both.
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
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
_VPN = ("utun", "tun", "tap", "wg", "ppp", "ipsec", "tailscale", "zt", "nordlynx")
"""Name prefixes of tunnel interfaces on macOS and Linux."""
_WIFI = ("wl", "awdl", "llw", "ath")


class Medium(IntEnum):
    """What carries an interface's packets, the best first. A tunnel is used only if a person names it."""

    WIRED = 0
    WIFI = 1
    VPN = 2


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface and its addresses with their subnets, as configured."""

    name: str
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    port: str = ""
    """The hardware behind it, if the system names it (macOS calls both Ethernet and Wi-Fi ``en``)."""

    @property
    def medium(self) -> Medium:
        if self.name.startswith(_VPN):
            return Medium.VPN
        return Medium.WIFI if self.port == "Wi-Fi" or self.name.startswith(_WIFI) else Medium.WIRED

    @property
    def title(self) -> str:
        """Its name for people, with what is behind it where that is known."""
        kind = self.port or ("Wi-Fi" if self.medium is Medium.WIFI else "")
        return f"{kind} ({self.name})" if kind else self.name

    @property
    def loopback(self) -> bool:
        return any(a.ip.is_loopback for a in self.addresses)

    @property
    def outer(self) -> bool:
        """Whether other Macs may be behind it directly: it is neither loopback nor a tunnel."""
        return not self.loopback and self.medium is not Medium.VPN


@dataclass(frozen=True, slots=True)
class Reach:
    """``senders``: own addresses whose interfaces carry the announcement; ``addresses``: those that it contains."""

    senders: tuple[str, ...]
    addresses: tuple[str, ...]


def interfaces() -> tuple[Interface, ...]:
    """Read the interfaces from the system; empty if there are none or the system does not tell."""
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
    """Return the name of the interface that has this address; empty for a wildcard or an unknown address."""
    return next((i.name for i in interfaces() if any(str(a.ip) == host for a in i.addresses)), "")


def address_on(name: str, local: Iterable[Interface]) -> str:
    """Return the address to listen on for a named interface. Raises InvalidOption that lists the interfaces."""
    known = {i.name: i for i in local}
    if name not in known:
        named = ", ".join(sorted(known)) or "none"
        raise InvalidOption(f"--interface {name}: no such interface; this Mac has {named}", field="interface")
    ips = [a.ip for a in known[name].addresses]
    usable = sorted((ip for ip in ips if _usable(ip)), key=lambda ip: (ip.version, ip.is_link_local))
    if not usable:
        raise InvalidOption(f"--interface {name} has no address now", field="interface")
    return str(usable[0])


def best_address(local: Iterable[Interface]) -> str:
    """Return this machine's best address for others: wired before Wi-Fi, no tunnel; loopback if there is no other."""
    outer = [i for i in local if i.outer]
    found = [
        (i.medium, a.ip.version, a.ip.is_link_local, str(a.ip)) for i in outer for a in i.addresses if _usable(a.ip)
    ]
    return min(found)[3] if found else LOOPBACK


def host_for_others(host: str, local: Iterable[Interface]) -> str:
    """Return the host at which others reach a server that listens on ``host``: the best address for a wildcard."""
    return best_address(local) if host in _WILDCARDS else host


def further_hosts(host: str, local: Iterable[Interface]) -> tuple[str, ...]:
    """Return this machine's other addresses at which a server that listens on ``host`` may be reached, too.

    Tunnels and loopback are left out, and IPv6 where an interface has IPv4: it would be the same cable again.
    """
    outer = [i for i in local if i.outer]
    found: list[str] = []
    for interface in outer:
        usable = [a.ip for a in interface.addresses if _usable(a.ip)]
        found += [str(ip) for ip in usable if ip.version == min(other.version for other in usable)]
    return tuple(sorted(set(found) - {host}))


def shared_hosts(hosts: Iterable[str], local: Iterable[Interface]) -> list[str]:
    """Return which of another machine's addresses are in a subnet of this one; tunnels and loopback do not count.

    An address that this machine has, too, is left out: virtual networks have the same one on every machine.
    """
    outer = [i for i in local if i.outer]
    own = [a for i in outer for a in i.addresses]
    others = [ip for ip in map(ip_address, hosts) if all(ip != a.ip for a in own)]
    return [str(ip) for ip in others if any(ip in a.network for a in own)]


def title_of(host: str, local: Iterable[Interface]) -> str:
    """Return the name for people of the interface that has this address; empty for an unknown address."""
    return next((i.title for i in local if any(str(a.ip) == host for a in i.addresses)), "")


def reach(host: str, local: Iterable[Interface]) -> Reach:
    """Return where to announce a server that listens on ``host`` (an IP address), and with which addresses.

    Loopback is announced on loopback. A wildcard is announced on every other interface with its addresses, or on
    loopback if there is no other. Any other address is announced on its own interface, or nowhere if none has it.
    """
    ip = ip_address(host)
    if ip.is_loopback:
        return Reach((LOOPBACK,), (host,))
    if ip.is_unspecified:
        return _everywhere(ip, [i for i in local if i.outer])
    own = [i for i in local if any(a.ip == ip for a in i.addresses)]
    if not own:
        return Reach((), ())
    return Reach((host,) if ip.version == 4 else _senders(own) or (host,), (host,))


def _everywhere(wildcard: IPv4Address | IPv6Address, outer: list[Interface]) -> Reach:
    ips = [a.ip for i in outer for a in i.addresses if wildcard.version == 6 or a.version == 4]
    # A link-local IPv6 address is useless without the reader's own scope.
    named = tuple(str(ip) for ip in ips if ip.version == 4 or not ip.is_link_local)
    if not named:
        return Reach((LOOPBACK,), (LOOPBACK,))
    return Reach(_senders(outer) or named, named)


def _senders(chosen: Iterable[Interface]) -> tuple[str, ...]:
    return tuple(str(a.ip) for i in chosen for a in i.addresses if a.version == 4)


def preferred_address(addresses: Iterable[str], local: Iterable[Interface]) -> str:
    """Return the address to try: IPv4 of an own subnet, then IPv6, any IPv4, loopback; empty if there is none.

    Wired subnets come before Wi-Fi's, and those before a tunnel's.
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
        # Self-assigned addresses are the same subnet on every cable, so a configured address is the safer choice.
        return 0 if near else 2, medium, ip.is_link_local, int(ip)

    usable = [ip for ip in map(ip_address, addresses) if _usable(ip)]
    return str(min(usable, key=rank)) if usable else ""


def _usable(ip: IPv4Address | IPv6Address) -> bool:
    if ip.is_unspecified or ip.is_multicast:
        return False
    return not (isinstance(ip, IPv6Address) and ip.is_link_local and ip.scope_id is None)
