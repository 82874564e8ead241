"""A worker's identity: a valid name, and an id that stays the same over restarts of its daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.core.errors import DuplicateName, InvalidOption
from cluster.platform.paths import hold_id, read_id
from cluster.platform.private_files import CHOOSE_FOLDER

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@contextmanager
def hold_identity(home: Path, name: str) -> Iterator[str]:
    """Yield the id of the worker ``name`` on this machine and hold it during the block. The first start creates it.

    Raises ``DuplicateName`` if a daemon of that name is running, ``InvalidOption`` if the folder cannot be written.
    """
    folder = _folder(home, name)
    with ExitStack() as stack:
        try:
            found = stack.enter_context(hold_id(folder))
        except BlockingIOError:
            raise DuplicateName(
                f"a worker named {name} already runs on this machine; give this one another name with --name"
            ) from None
        except OSError as e:
            raise _write_error(folder, e) from e
        yield found


def read_worker_id(home: Path, name: str) -> str:
    """Return the id of the worker ``name``, even while its daemon runs. Raises ``InvalidOption``."""
    folder = _folder(home, name)
    try:
        return read_id(folder)
    except OSError as e:
        raise _write_error(folder, e) from e


def _folder(home: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InvalidOption(
            f"{name[:64]!r} cannot be a worker's name; use letters, digits, '.', '_' and '-', at most 63"
        )
    return home / "workers" / name


def _write_error(folder: Path, e: OSError) -> InvalidOption:
    return InvalidOption(f"cannot write this worker's id to {folder}: {e.strerror}; {CHOOSE_FOLDER}")
