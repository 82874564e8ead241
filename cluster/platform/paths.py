"""The folder for this machine's state, the ids on its disk, and its name."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cluster.platform.private_files import make_private_folder, write_all

HOME_VARIABLE: Final = "MACPIPE_HOME"


def state_home(given: Path | None = None) -> Path:
    """Return ``given``, else ``MACPIPE_HOME``, else the platform's usual folder for state; as an absolute path."""
    return absolute_path(_state_home(given).expanduser())


def absolute_path(path: Path) -> Path:
    """Return ``path`` as absolute, or unchanged if the current folder has been deleted."""
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


_ID: Final = re.compile(r"[0-9A-Za-z]{1,64}")


@contextmanager
def hold_id(folder: Path) -> Iterator[str]:
    """Hold the id in ``folder`` during the block. It is created at the first start.

    Raises ``BlockingIOError`` if another process holds it, another ``OSError`` if the folder cannot be written.
    """
    make_private_folder(folder)
    file = os.open(folder / "id", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield _read_or_create(file)
    finally:
        os.close(file)


def read_id(folder: Path) -> str:
    """Return the id in ``folder``, even while another process holds it. It is created if there is none.

    Raises ``OSError`` if the folder cannot be written.
    """
    try:
        with hold_id(folder) as found:
            return found
    except BlockingIOError:
        return (folder / "id").read_text(encoding="ascii", errors="replace").strip()


def _read_or_create(file: int) -> str:
    """Return the id in the file, or write a new one if the content is not an id, as after a crash."""
    known = os.read(file, 65).decode("ascii", "replace").strip()
    if _ID.fullmatch(known):
        return known
    made = secrets.token_hex(8)
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    try:
        write_all(file, f"{made}\n".encode())
        os.fsync(file)
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, 0)  # a part of an id would be taken for an id
        raise
    return made


def short_host_name() -> str:
    """Return the machine's name without its domain, such as ``mac-studio``."""
    return socket.gethostname().split(".")[0] or "mac"
