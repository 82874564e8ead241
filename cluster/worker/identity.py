"""A worker's identity: an id that stays the same over restarts, kept in a file that only one daemon may hold."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import DuplicateName, InvalidOption

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@contextmanager
def identity(home: Path, name: str) -> Iterator[str]:
    """The id of the worker ``name`` on this machine, made at its first start; held until the context ends.

    Raises ``DuplicateName`` where a daemon of that name runs already, ``InvalidOption`` where the folder cannot be
    written.
    """
    if not _NAME.fullmatch(name):
        raise InvalidOption(
            f"{name[:64]!r} cannot be a worker's name; use letters, digits, '.', '_' and '-', at most 63"
        )
    folder = home / "workers" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(folder / "id", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise InvalidOption(f"cannot keep this worker's id in {folder}: {e.strerror}; set MACPIPE_HOME") from e
    try:
        yield _locked_id(file, name)
    finally:
        os.close(file)


def _locked_id(file: int, name: str) -> str:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DuplicateName(
            f"a worker named {name} already runs on this machine; give this one another name with --name"
        ) from None
    known = os.read(file, 64).decode("ascii", "replace").strip()
    if known:
        return known
    made = secrets.token_hex(8)
    os.write(file, f"{made}\n".encode())
    return made
