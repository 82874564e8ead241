"""Where the coordinator is: an argument, else MACPIPE_COORDINATOR, else this machine. It opens nothing."""

from __future__ import annotations

import os
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.core.text import format_address, parse_address

COORDINATOR_VARIABLE: Final = "MACPIPE_COORDINATOR"
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 7700


def coordinator_address(given: str | None = None) -> str:
    """``host:port`` of the coordinator to talk to; a host alone gets the default port.

    Raises InvalidOption for what is no address (a URL, a port out of range), saying where it was written.
    """
    written = (given or os.environ.get(COORDINATOR_VARIABLE) or DEFAULT_HOST).strip()
    alone = ":" not in written or written.endswith("]")
    try:
        return format_address(*parse_address(f"{written}:{DEFAULT_PORT}" if alone else written))
    except InvalidOption as wrong:
        source = "--coordinator" if given else COORDINATOR_VARIABLE
        raise InvalidOption(f"{source}: {wrong.sentence}", field="coordinator") from None
