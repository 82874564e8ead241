"""Determines the coordinator's address: an argument, else MACPIPE_COORDINATOR, else this machine."""

from __future__ import annotations

import os
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.core.text import format_address, parse_address

COORDINATOR_VARIABLE: Final = "MACPIPE_COORDINATOR"
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 7700


def resolve_address(given: str | None = None) -> str:
    """Return the coordinator's ``host:port``. A host without a port gets the default port.

    Raise InvalidOption for an invalid address (a URL, a port out of range), naming the option or variable.
    """
    written = (given or os.environ.get(COORDINATOR_VARIABLE) or DEFAULT_HOST).strip()
    has_no_port = ":" not in written or written.endswith("]")
    try:
        return format_address(*parse_address(f"{written}:{DEFAULT_PORT}" if has_no_port else written))
    except InvalidOption as wrong:
        source = "--coordinator" if given else COORDINATOR_VARIABLE
        raise InvalidOption(f"{source}: {wrong.sentence}", field="coordinator") from None
