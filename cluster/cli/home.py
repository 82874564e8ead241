"""What this machine is called."""

from __future__ import annotations

import socket


def short_host_name() -> str:
    """The machine's name without its domain: ``mac-studio``."""
    return socket.gethostname().split(".")[0] or "mac"
