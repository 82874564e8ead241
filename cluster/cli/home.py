"""Where this machine keeps macpipe's small state, and what it is called."""

from __future__ import annotations

import socket

from cluster.home import state_home as state_home


def short_host_name() -> str:
    """The machine's name without its domain: ``mac-studio``."""
    return socket.gethostname().split(".")[0] or "mac"
