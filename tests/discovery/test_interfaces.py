"""The choice of an interface: wired before Wi-Fi, and a tunnel only if a person names it."""

from __future__ import annotations

from ipaddress import ip_interface

import pytest

from cluster.core.errors import InvalidOption
from cluster.discovery.interfaces import (
    Interface,
    Medium,
    address_on,
    further_hosts,
    preferred_address,
    reach,
    shared_hosts,
    title_of,
)


def interface(name: str, *addresses: str, port: str = "") -> Interface:
    return Interface(name, tuple(ip_interface(a) for a in addresses), port)


WIFI = interface("en1", "192.168.1.5/24", port="Wi-Fi")
CABLE = interface("bridge0", "192.168.7.5/24", port="Thunderbolt Bridge")
VPN = interface("utun3", "100.100.0.5/16")


@pytest.mark.parametrize(
    ("made", "medium"),
    [
        (WIFI, Medium.WIFI),
        (CABLE, Medium.WIRED),
        (VPN, Medium.VPN),
        (interface("wlp3s0"), Medium.WIFI),
        (interface("enp0s31f6"), Medium.WIRED),
        (interface("wg0"), Medium.VPN),
        (interface("tailscale0"), Medium.VPN),
        (interface("awdl0"), Medium.WIFI),
    ],
)
def test_what_carries_an_interface(made: Interface, medium: Medium) -> None:
    assert made.medium is medium


def test_wired_goes_before_wifi_and_a_tunnel_comes_last() -> None:
    local = [WIFI, CABLE, VPN]
    assert preferred_address(["192.168.1.9", "192.168.7.9", "100.100.0.9"], local) == "192.168.7.9"
    assert preferred_address(["192.168.1.9", "100.100.0.9"], local) == "192.168.1.9"
    assert preferred_address(["10.9.9.9", "100.100.0.9"], local) == "10.9.9.9"
    assert preferred_address(["100.100.0.9"], local) == "100.100.0.9", "somebody named it, or it would not be announced"


def test_a_wildcard_is_not_announced_on_a_tunnel() -> None:
    assert reach("0.0.0.0", [WIFI, CABLE, VPN]).addresses == ("192.168.1.5", "192.168.7.5")  # noqa: S104
    assert reach("100.100.0.5", [WIFI, VPN]).addresses == ("100.100.0.5",)


def test_an_interface_by_name() -> None:
    assert address_on("utun3", [WIFI, VPN]) == "100.100.0.5"
    with pytest.raises(InvalidOption, match="no such interface; this Mac has en1, utun3"):
        address_on("en9", [WIFI, VPN])
    with pytest.raises(InvalidOption, match="no address now"):
        address_on("en7", [interface("en7")])


def test_a_data_port_listens_on_every_address_but_a_tunnels() -> None:
    loopback, both = interface("lo0", "127.0.0.1/8"), interface("en0", "10.0.0.5/24", "fd00::5/64")
    assert further_hosts("192.168.1.5", [WIFI, CABLE, VPN, loopback, both]) == ("10.0.0.5", "192.168.7.5")
    assert further_hosts("10.0.0.5", [interface("en1", "fd00::6/64", "fe80::1/64"), both]) == ("fd00::6",)


def test_two_macs_share_the_addresses_of_a_common_subnet() -> None:
    virtual = interface("bridge100", "192.168.64.1/24")
    theirs = ["192.168.1.9", "192.168.7.9", "100.100.0.9", "192.168.64.1", "10.0.0.9"]
    assert shared_hosts(theirs, [WIFI, CABLE, VPN, virtual]) == ["192.168.1.9", "192.168.7.9"]


def test_an_interface_is_named_with_what_is_behind_it() -> None:
    local = [WIFI, CABLE, interface("wlan0", "10.1.0.5/24"), interface("eth0", "10.2.0.5/24")]
    titles = [title_of(host, local) for host in ("192.168.1.5", "192.168.7.5", "10.1.0.5", "10.2.0.5", "10.3.0.5")]
    assert titles == ["Wi-Fi (en1)", "Thunderbolt Bridge (bridge0)", "Wi-Fi (wlan0)", "eth0", ""]
