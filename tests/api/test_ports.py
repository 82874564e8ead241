"""What a coordinator tells other Macs of its ports leads them to it, not to themselves."""

from __future__ import annotations

from ipaddress import ip_interface

import pytest

from cluster.api.ports import addresses_for_others, url_for_others
from cluster.discovery.interfaces import Interface

LOCAL = (Interface("lo0", (ip_interface("127.0.0.1/8"),)), Interface("en0", (ip_interface("192.168.1.5/24"),)))
ALONE = LOCAL[:1]


@pytest.mark.parametrize(
    ("listening", "told"),
    [
        (("127.0.0.1:7700", "192.168.1.5:7700"), ("192.168.1.5:7700",)),
        (("0.0.0.0:7700",), ("192.168.1.5:7700",)),
        (("[::]:7700", "127.0.0.1:7700"), ("192.168.1.5:7700",)),
        (("127.0.0.1:7700",), ("127.0.0.1:7700",)),
        (("[fd00::5]:7700",), ("[fd00::5]:7700",)),
        (("mac-1.local:7700",), ("mac-1.local:7700",)),
    ],
)
def test_grpc_addresses(listening: tuple[str, ...], told: tuple[str, ...]) -> None:
    assert addresses_for_others(listening, LOCAL) == told


def test_http_urls() -> None:
    assert url_for_others("https://0.0.0.0:8080", LOCAL) == "https://192.168.1.5:8080"
    assert url_for_others("https://[::]:8080", LOCAL) == "https://192.168.1.5:8080"
    assert url_for_others("http://127.0.0.1:8080", LOCAL) == "http://127.0.0.1:8080"


def test_without_a_network_the_own_address_is_told() -> None:
    assert addresses_for_others(("0.0.0.0:7700",), ALONE) == ("127.0.0.1:7700",)
    assert url_for_others("https://0.0.0.0:8080", ALONE) == "https://127.0.0.1:8080"
