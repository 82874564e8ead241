"""Parse and format addresses, layer ranges, sizes, durations and counts as people write them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.core.group_limits import MAX_RANKS
from cluster.core.limits import GIB, KIB, MAX_FACT_CHARS, MAX_STAGES, MIB
from cluster.core.plan import LayerRange, Link

HIGHEST_PORT = 65_535


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``mac-1.local:7000``, ``10.0.0.5:7000`` or ``[fd00::5]:7000``.

    Raises InvalidOption that says what is wrong.
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
    """Return the notation that ``parse_address`` reads; IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether the address is this machine's own; a name other than ``localhost`` is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_ip_address(host: str) -> bool:
    """Return whether this is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def link_in_words(link: Link) -> str:
    """Return what carries a link and its measured speed, to follow the names of its ends."""
    over = f" over {link.interface}" if link.interface else ""
    return f"{over}: {figure_in_words(link.bandwidth / 1e9)} GB/s, round trip {link.round_trip_s * 1e3:.1f} ms"


_RANGE: Final = re.compile(r"\s*(?P<first>[0-9]{1,6})\s*(-\s*(?P<last>[0-9]{1,6})\s*)?")


def parse_layers(written: str) -> tuple[LayerRange, ...]:
    """Parse one range per stage, from layer 0 on without gaps. Raises InvalidOption that names the bad part."""
    if written.count(",") >= MAX_STAGES:
        raise InvalidOption(f"--layers names more than {MAX_STAGES} stages", field="layers")
    ranges: list[LayerRange] = []
    for part in written.split(","):
        due = ranges[-1].end if ranges else 0
        found = parse_range(part)
        if found.start != due:
            raise _wrong(part, f"must begin with layer {due}: the ranges start at 0 and leave no gap")
        ranges.append(found)
    return tuple(ranges)


def parse_range(part: str) -> LayerRange:
    """Parse one range, such as ``4-7``. Raises InvalidOption."""
    found = _RANGE.fullmatch(part)
    if not found:
        raise _wrong(part, "is not a range; write --layers like 0-3,4-7")
    first, last = int(found["first"]), int(found["last"] or found["first"])
    if last < first:
        raise _wrong(part, "ends before it starts")
    return LayerRange(first, last + 1)


def parse_groups(written: Iterable[str], option: str) -> tuple[tuple[str, ...], ...]:
    """Parse groups of workers such as ``ada+bob``. Raises InvalidOption that names ``option``."""
    return tuple(require_group(tuple(name.strip() for name in one.split("+")), option) for one in written)


def require_group(names: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return the names of a group's workers. Raises InvalidOption if they are none."""
    shown = "+".join(names)[:MAX_FACT_CHARS]
    if not 2 <= len(names) <= MAX_RANKS or not all(names) or any(len(name) > MAX_FACT_CHARS for name in names):
        why = f"--{option} {shown!r} names no group; write 2 to {MAX_RANKS} workers like ada+bob"
        raise InvalidOption(why, field=option)
    if len(set(names)) < len(names):
        raise InvalidOption(f"--{option} {shown!r} names a worker twice", field=option)
    return names


def _wrong(part: str, why: str) -> InvalidOption:
    return InvalidOption(f"--layers: {part.strip()[:64]!r} {why}", field="layers")


_SIZE: Final = re.compile(
    r"(?P<number>[0-9]{1,18}(\.[0-9]{1,18})?)\s*(?P<prefix>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE
)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LEAST_BARE_SIZE: Final = 64 * 2**20
"""The smallest number of bytes that may be written without a unit."""


def parse_size(written: str, option: str) -> int:
    """Return bytes: ``24G`` and ``24GB`` are powers of ten, ``24GiB`` of two.

    Raises InvalidOption for ``option``, also for a small number without a unit: it was meant to have one.
    """
    found = _SIZE.fullmatch(written.strip())
    base = 1024 if found and found["binary"] else 1000
    size = int(float(found["number"]) * base ** _POWERS[found["prefix"].lower()]) if found else 0
    if size <= 0:
        raise InvalidOption(f"{option} {written!r} is not a size; write it like 24GiB", field=option.lstrip("-"))
    if found and not found["prefix"] and size < _LEAST_BARE_SIZE:
        raise InvalidOption(
            f"{option} {written!r} means {size} bytes; add a unit, like 24GiB", field=option.lstrip("-")
        )
    return size


_DURATION: Final = re.compile(r"(?P<number>\d{1,9}(\.\d{1,3})?)\s*(?P<unit>[smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration(written: str, option: str) -> float:
    """Return seconds. Raises ``InvalidOption`` that names ``option``."""
    found = _DURATION.fullmatch(written.strip().lower())
    if not found:
        raise InvalidOption(
            f"{option} {written!r} is not a duration; write it like 30m or 2h", field=option.lstrip("-")
        )
    return float(found["number"]) * _SECONDS[found["unit"]]


def duration_in_words(seconds: float) -> str:
    """Format a duration for people: ``59 min``, ``2 h``, ``3 days``."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if round(seconds / size) >= 2:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def names_in_words(names: Sequence[str]) -> str:
    """Return names like ``ada, bob and cyd``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def count_in_words(count: int, noun: str) -> str:
    """Return ``1 stage`` or ``2 stages``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def place_in_words(index: int, rank: int, ranks: int) -> str:
    """Return a worker's place in a plan: ``0``, or ``0, rank 1 of 2`` where several share the layers of the stage."""
    return f"{index}, rank {rank} of {ranks}" if ranks > 1 else str(index)


def figure_in_words(number: float) -> str:
    """Format with three significant digits, or as an integer from 100 on; never with an exponent of ten."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def gib_in_words(nbytes: float) -> str:
    """Format a size in GiB, or in MiB or KiB if it is less than a hundredth of that."""
    unit, name = next(((u, n) for u, n in ((GIB, "GiB"), (MIB, "MiB")) if nbytes >= u / 100), (KIB, "KiB"))
    return f"{figure_in_words(nbytes / unit)} {name}"


def with_subject(name: str, text: str, label: str = "") -> str:
    """Return ``text``, prefixed with ``label`` (by default ``name``) and a colon unless it mentions ``name``."""
    return text if name in text else f"{label or name}: {text}"
