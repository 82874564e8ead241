"""Derives the HTTP port's settings: plain or TLS, with or without API keys, and the allowed hosts and origins."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from cluster.api.http.origin_policy import OriginPolicy, check_host, check_origin
from cluster.api.http.server import unprotected_port_error
from cluster.coordinator.settings import ServeSettings
from cluster.core.errors import AuthorityElsewhere, ClusterDamaged
from cluster.core.text import is_loopback
from cluster.discovery.cluster_name import cluster_host_name
from cluster.discovery.interfaces import interfaces
from cluster.security.authority import find_holder, read_authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.https import GivenCertificate, HttpCertificate, KeptCertificate, OwnCertificate
from cluster.security.keys import KeyStore

_OWN: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class HttpPort:
    """The settings of a coordinator's HTTP port.

    ``keys`` None: no API key is needed. ``certificate`` None: plain HTTP, which is allowed on loopback only.
    ``problem``: why it must not be opened yet, since its certificate has to come from another Mac; "" if it may.
    """

    sites: OriginPolicy
    keys: KeyStore | None
    certificate: HttpCertificate | None
    problem: str = ""


def http_port(settings: ServeSettings) -> HttpPort:
    """Return the port that ``settings`` describe. Raises ``InvalidOption``, also if HTTP would be open to everybody."""
    folder = ClusterFolder(settings.home, settings.cluster)
    host = settings.http.address[0] if settings.http.address else _OWN[1]
    network = not is_loopback(host)
    if network and not folder.exists:
        raise unprotected_port_error(host)
    hosts = _allowed_hosts(settings, folder, host, network=network)
    sites = OriginPolicy(frozenset(hosts), frozenset(check_origin(one) for one in settings.http.origins))
    keys = KeyStore(folder) if folder.exists else None
    try:
        return HttpPort(sites, keys, _certificate(settings, folder, hosts, network))
    except AuthorityElsewhere:
        return HttpPort(sites, keys, None, f"HTTP is off until its certificate comes from {find_holder(folder).place}")


def hosts_certified_elsewhere(settings: ServeSettings) -> tuple[str, ...]:
    """Return the hosts for which this Mac's HTTPS needs a certificate from another Mac; none if it does not.

    Raises as ``http_port`` does.
    """
    folder = ClusterFolder(settings.home, settings.cluster)
    host = settings.http.address[0] if settings.http.address else _OWN[1]
    if is_loopback(host) or settings.http.certificate or not folder.coordinates or find_holder(folder).here:
        return ()
    return _hosts_to_certify(_allowed_hosts(settings, folder, host, network=True))


def _allowed_hosts(settings: ServeSettings, folder: ClusterFolder, host: str, *, network: bool) -> tuple[str, ...]:
    """Return the host names and addresses, beside those of loopback, under which the port may be called."""
    named = tuple(check_host(name) for name in settings.http.hosts)
    return (*names_of_this_mac(host), _cluster_name(folder), *named) if network else named


def _cluster_name(folder: ClusterFolder) -> str:
    """Return the host name of the cluster's leader, which this Mac may be. Raises ``ClusterDamaged``."""
    try:
        return cluster_host_name(read_authority(folder.authority.read_bytes()).cluster)
    except (OSError, ValueError) as e:
        raise ClusterDamaged(f"cannot use {folder.authority}: {e}; put back a copy of it, or join again") from e


def _certificate(
    settings: ServeSettings, folder: ClusterFolder, hosts: tuple[str, ...], network: bool
) -> HttpCertificate | None:
    if settings.http.certificate:
        return GivenCertificate(*settings.http.certificate)
    if not network:
        return None
    if folder.coordinates and not find_holder(folder).here:
        return KeptCertificate(folder)
    return OwnCertificate(folder, _hosts_to_certify(hosts))


def _hosts_to_certify(hosts: Sequence[str]) -> tuple[str, ...]:
    """Return the names and addresses of an HTTPS certificate for a port that is reached at ``hosts``."""
    return tuple(dict.fromkeys((*hosts, *_OWN)))


def names_of_this_mac(host: str) -> tuple[str, ...]:
    """Return the names and addresses of this Mac on the network; only ``host``'s address if it is a specific one."""
    try:
        specific = not ip_address(host).is_unspecified
    except ValueError:
        specific = True
    addresses = [host.lower()] if specific else _addresses()
    short = socket.gethostname().split(".")[0]
    names = [socket.gethostname(), short, f"{short}.local"]
    return tuple(dict.fromkeys((*(name.lower() for name in names if name), *addresses)))


def _addresses() -> list[str]:
    found = [a.ip for interface in interfaces() for a in interface.addresses]
    return [str(ip) for ip in found if not (ip.is_loopback or (ip.version == 6 and ip.is_link_local))]
