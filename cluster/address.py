"""``host:port`` as people write it, taken apart and put together.

It knows the notation alone: no name is resolved and nothing is connected to here.
"""

from __future__ import annotations

import ipaddress

from cluster.errors import InvalidOption

HIGHEST_PORT = 65_535


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``mac-1.local:7000``, ``10.0.0.5:7000`` or ``[fd00::5]:7000``.

    Raises InvalidOption, with a sentence that says what is wrong.
    """
    host, colon, port = text.rpartition(":")
    if "/" in text or any(c.isspace() or not c.isprintable() for c in text):
        raise InvalidOption(f"{text!r} is not an address: write host:port, without a scheme, a path or spaces")
    if not colon or not host or port.endswith("]"):
        raise InvalidOption(f"{text!r} is not an address: write host:port, such as mac-1.local:7000")
    return _parse_host(host, text), _parse_port(port, text)


def _parse_host(host: str, text: str) -> str:
    bracketed = host.startswith("[") and host.endswith("]")
    inner = host[1:-1] if bracketed else host
    if ":" in inner and not bracketed:
        raise InvalidOption(f"{text!r} is ambiguous: write an IPv6 address in brackets, such as [fd00::5]:7000")
    if not inner or "[" in inner or "]" in inner or (bracketed and ":" not in inner):
        raise InvalidOption(f"{text!r} is not an address: brackets hold an IPv6 address, such as [fd00::5]:7000")
    return inner


def _parse_port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit()) or len(port) > 5 or not 1 <= int(port) <= HIGHEST_PORT:
        raise InvalidOption(f"{text!r} has no usable port: {port!r} is not a number from 1 to {HIGHEST_PORT}")
    return int(port)


def format_address(host: str, port: int) -> str:
    """The notation that ``parse_address`` reads; IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether the address is this machine's own; a name other than ``localhost`` is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
