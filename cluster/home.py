"""Where this machine keeps macpipe's small state. It creates nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

HOME_VARIABLE: Final = "MACPIPE_HOME"


def state_home(given: Path | None = None) -> Path:
    """``given``, else ``MACPIPE_HOME``, else the platform's usual folder for state; absolute."""
    return absolute_path(_state_home(given).expanduser())


def absolute_path(path: Path) -> Path:
    """``path`` from the current folder, or as it is where that folder has been deleted."""
    try:
        return path.absolute()
    except FileNotFoundError:
        return path


def _state_home(given: Path | None) -> Path:
    if given is not None:
        return given
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "macpipe"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "macpipe"
