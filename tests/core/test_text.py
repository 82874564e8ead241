from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import InvalidOption
from cluster.core.text import format_address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.5:7000", "10.0.0.5", 7000),
        ("mac-1.local:1", "mac-1.local", 1),
        ("[::1]:7000", "::1", 7000),
        ("[fe80::1%en0]:65535", "fe80::1%en0", 65535),
    ],
)
def test_addresses_are_read_and_written_back(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert format_address(host, port) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "write host:port"),
        ("mac-1", "write host:port"),
        (":7000", "write host:port"),
        ("[::1]", "write host:port"),
        ("http://mac-1:7000", "without a scheme"),
        ("mac 1:7000", "spaces"),
        ("mac-1\x1b[31m:7000", "host:port"),
        ("::1:7000", "in brackets"),
        ("[]:7000", "brackets hold an IPv6 address"),
        ("[mac-1]:7000", "brackets hold an IPv6 address"),
        ("mac-1:", "'' is not a number from 1 to 65535"),
        ("mac-1:0", "'0' is not a number"),
        ("mac-1:65536", "'65536' is not a number"),
        ("mac-1:-1", "'-1' is not a number"),
        ("mac-1:７000", "is not a number"),  # noqa: RUF001
        ("mac-1:http", "'http' is not a number"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_address(text)
    assert why in caught.value.sentence
    assert repr(text) in caught.value.sentence


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = parse_address(text)
    except InvalidOption:
        return
    assert parse_address(format_address(host, port)) == (host, port)
