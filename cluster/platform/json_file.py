"""State on disk as JSON: files are replaced atomically, and read up to a maximal size.

The module knows JSON and files. It does not know what the state means: readers check the values themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.platform.private_files import make_private_folder, replace_file


def encode_json(content: object) -> bytes:
    """Return ``content`` as one line of JSON. Raises ValueError or TypeError for what JSON cannot hold."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def write_json(path: Path, content: object) -> None:
    """Replace ``path`` by ``content`` atomically, synced to disk. Raises OSError and leaves the old file then.

    Missing folders are created.
    """
    encoded = encode_json(content)
    make_private_folder(path.parent)
    replace_file(path, encoded)


def read_json(path: Path, max_bytes: int) -> Any:
    """Return the content of ``path``. Raises OSError, and ValueError for invalid JSON or more than ``max_bytes``."""
    with path.open("rb") as file:
        encoded = file.read(max_bytes + 1)
    if len(encoded) > max_bytes:
        raise ValueError(f"the file has more than {max_bytes} bytes")
    return decode_json(encoded)


def decode_json(encoded: bytes) -> Any:
    """Return what ``encoded`` holds. Raises ValueError for invalid JSON."""
    try:
        return json.loads(encoded, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")
