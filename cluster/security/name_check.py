"""Check names of clusters, members and keys. They name folders and files, so not every text is allowed."""

from __future__ import annotations

import re
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.security.limits import MAX_NAME_CHARS

NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARS - 1}}}")


def check_name(name: str, whose: str) -> str:
    """Return ``name`` if it is allowed as ``whose`` name (``a cluster's``). Raises ``InvalidOption``."""
    if not NAME.fullmatch(name):
        raise InvalidOption(
            f"{name[:64]!r} cannot be {whose} name; use letters, digits, '.', '_' and '-', at most {MAX_NAME_CHARS}"
        )
    return name
