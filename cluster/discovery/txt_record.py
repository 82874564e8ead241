"""Write and read a worker's announcement: the service type, the instance name and the TXT record.

A record that is read was written by a stranger. Nothing in it is secret, and nothing in it is trusted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from cluster.core.errors import InvalidOption

SERVICE: Final = "_macpipe._tcp.local."
MAX_FIELD_BYTES: Final = 128
"""Length of an id, name, version or cluster. A TXT string holds 255 bytes; host names have at most 63."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """The fields of the TXT record: printable text of at most ``MAX_FIELD_BYTES`` bytes; only ``name`` may be empty."""

    id: str
    name: str
    version: str
    cluster: str

    def __post_init__(self) -> None:
        for field in fields(self):
            text: str = getattr(self, field.name)
            if len(text.encode("utf-8", "replace")) > MAX_FIELD_BYTES or not text.isprintable():
                raise InvalidOption(
                    f"the {field.name} {text[:64]!r} cannot be announced; use printable text of at most"
                    f" {MAX_FIELD_BYTES} bytes"
                )
            if not text and field.name != "name":
                raise InvalidOption(f"the {field.name} that a worker announces is empty; give one")


def write(announcement: Announcement) -> dict[bytes, bytes]:
    return {field.name.encode(): getattr(announcement, field.name).encode() for field in fields(announcement)}


def read(properties: Mapping[bytes, bytes | None]) -> Announcement | None:
    """Return a stranger's announcement; None if it is malformed. Unknown fields are ignored."""
    try:
        values = {f.name: (properties[f.name.encode()] or b"").decode() for f in fields(Announcement)}
        return Announcement(**values)
    except (KeyError, UnicodeDecodeError, InvalidOption):
        return None


def instance(announcement: Announcement) -> str:
    """Return a unique DNS label that people can read: the shortened name and a hash of the cluster and the id.

    Two clusters of one network may hold the same id, in copied state folders. One's goodbye must not hide the other.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", announcement.name).strip("-")[:40]
    unique = hashlib.sha256(f"{announcement.cluster}\n{announcement.id}".encode()).hexdigest()[:12]
    return f"{readable or 'worker'}-{unique}"
