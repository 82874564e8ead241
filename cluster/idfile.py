"""An id that stays the same over restarts, kept in a file that only one process may hold."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cluster.private_files import make_private_folder, write_all

_ID: Final = re.compile(r"[0-9A-Za-z]{1,64}")


@contextmanager
def held_id(folder: Path) -> Iterator[str]:
    """The id in ``folder``, made at the first start; held until the context ends.

    Raises ``BlockingIOError`` where another process holds it, another ``OSError`` where the folder cannot be written.
    """
    make_private_folder(folder)
    file = os.open(folder / "id", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield _known(file)
    finally:
        os.close(file)


def known_id(folder: Path) -> str:
    """The id in ``folder``, made where there is none, also while another process holds it.

    Raises ``OSError`` where the folder cannot be written.
    """
    try:
        with held_id(folder) as found:
            return found
    except BlockingIOError:
        return (folder / "id").read_text(encoding="ascii", errors="replace").strip()


def _known(file: int) -> str:
    """What the file holds; where that is no id, as after a crash, a new one."""
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
