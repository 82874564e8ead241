"""Reading of untrusted records and of this machine's interfaces: pure functions, no network."""

from __future__ import annotations

from ipaddress import ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import InvalidOption
from cluster.discovery import txt_record as txt
from cluster.discovery.interfaces import Interface, Reach, interfaces, preferred_address, reach

GOOD = {b"id": b"i", b"name": "Ada’s Mac".encode(), b"version": b"0.1", b"cluster": b"home"}  # noqa: RUF001


def link(name: str, *addresses: str) -> Interface:
    return Interface(name, tuple(ip_interface(a) for a in addresses))


LOOPBACK = link("lo0", "127.0.0.1/8", "::1/128")
WIRE = link("en0", "10.0.0.5/24", "fd00::5/64", "fe80::5/64")
CABLE = link("bridge0", "169.254.7.7/16", "fe80::7/64")
SIX = link("en9", "fd09::9/64")
LOCAL = (CABLE, WIRE, LOOPBACK)


def test_an_announcement_is_read_as_written() -> None:
    said = txt.Announcement("i", "Ada’s Mac", "0.1", "home")  # noqa: RUF001
    assert txt.write(said) == GOOD
    assert txt.read({**GOOD, b"later": None}) == said


@pytest.mark.parametrize(
    "wrong",
    [
        {b"id": b""},
        {b"id": None},
        {b"cluster": b"\xff"},
        {b"name": b"a\x1b[2J"},
        {b"version": b"v" * 129},
        {b"id": b"\0"},
    ],
)
def test_a_malformed_announcement_is_nothing(wrong: dict[bytes, bytes | None]) -> None:
    assert txt.read({**GOOD, **wrong}) is None


@pytest.mark.parametrize("key", [b"id", b"name", b"version", b"cluster"])
def test_an_announcement_without_a_field_is_nothing(key: bytes) -> None:
    assert txt.read({k: v for k, v in GOOD.items() if k != key}) is None


@given(st.dictionaries(st.sampled_from([*GOOD, b"x"]), st.none() | st.binary(max_size=200)))
def test_no_record_raises(properties: dict[bytes, bytes | None]) -> None:
    txt.read(properties)


@pytest.mark.parametrize("field", ["id", "version", "cluster"])
def test_what_cannot_be_announced_is_refused(field: str) -> None:
    fields = {"id": "i", "name": "n", "version": "v", "cluster": "c"}
    with pytest.raises(InvalidOption, match=field):
        txt.Announcement(**{**fields, field: ""})
    with pytest.raises(InvalidOption, match=field):
        txt.Announcement(**{**fields, field: "x" * 129})


@given(st.text(max_size=32), st.text(min_size=1, max_size=32))
def test_an_instance_name_is_a_dns_label_that_only_the_same_id_of_a_cluster_shares(name: str, other: str) -> None:
    try:
        one, two = txt.Announcement("i", name, "v", "c"), txt.Announcement(f"i{other}", name, "v", "c")
        elsewhere = txt.Announcement("i", name, "v", f"c{other}")
    except InvalidOption:
        return
    label = txt.instance(one)
    assert len(label) <= 63
    assert label.replace("-", "").isalnum()
    assert label.isascii()
    assert label not in {txt.instance(two), txt.instance(elsewhere)}


@pytest.mark.parametrize(
    ("host", "senders", "addresses"),
    [
        ("127.0.0.1", ("127.0.0.1",), ("127.0.0.1",)),
        ("::1", ("127.0.0.1",), ("::1",)),
        ("0.0.0.0", ("169.254.7.7", "10.0.0.5"), ("169.254.7.7", "10.0.0.5")),  # noqa: S104
        ("::", ("169.254.7.7", "10.0.0.5"), ("169.254.7.7", "10.0.0.5", "fd00::5")),
        ("10.0.0.5", ("10.0.0.5",), ("10.0.0.5",)),
        ("fd00::5", ("10.0.0.5",), ("fd00::5",)),
        ("10.9.9.9", (), ()),
    ],
)
def test_where_a_host_is_announced(host: str, senders: tuple[str, ...], addresses: tuple[str, ...]) -> None:
    assert reach(host, LOCAL) == Reach(senders, addresses)


def test_a_machine_without_a_network_announces_a_wildcard_to_itself() -> None:
    assert reach("0.0.0.0", [LOOPBACK]) == Reach(("127.0.0.1",), ("127.0.0.1",))  # noqa: S104


def test_a_machine_with_ipv6_alone_announces_over_it() -> None:
    assert reach("fd09::9", [LOOPBACK, SIX]) == Reach(("fd09::9",), ("fd09::9",))
    assert reach("::", [LOOPBACK, SIX]) == Reach(("fd09::9",), ("fd09::9",))


@pytest.mark.parametrize(
    ("addresses", "choice"),
    [
        (["127.0.0.1"], "127.0.0.1"),
        (["::1"], "::1"),
        (["127.0.0.1", "10.0.0.9"], "10.0.0.9"),
        (["169.254.1.1", "10.0.0.9"], "10.0.0.9"),
        (["192.168.1.1", "169.254.1.1"], "169.254.1.1"),
        (["192.168.1.1", "fd55::1", "fd00::9"], "fd00::9"),
        (["192.168.1.1", "fd55::1"], "fd55::1"),
        (["192.168.1.1", "fe80::1"], "192.168.1.1"),
        (["fe80::1%4"], "fe80::1%4"),
        (["0.0.0.0", "224.0.0.1", "::", "ff02::1", "fe80::1"], ""),  # noqa: S104
        ([], ""),
    ],
)
def test_which_of_several_addresses_is_taken(addresses: list[str], choice: str) -> None:
    assert preferred_address(addresses, LOCAL) == choice
    assert preferred_address(reversed(addresses), LOCAL) == choice


def test_this_machine_has_a_loopback_interface() -> None:
    assert any(i.loopback for i in interfaces())
