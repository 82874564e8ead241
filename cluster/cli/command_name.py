"""How this command is called, so that a printed hint works when it is copied."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command_name() -> str:
    """Return ``macpipe`` if that is on the PATH, else the path of the script beside this Python, quoted for a shell."""
    script = Path(sys.executable).with_name("macpipe")
    if shutil.which("macpipe") or not script.is_file():
        return "macpipe"
    return shlex.quote(str(script))
