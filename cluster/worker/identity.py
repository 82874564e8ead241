"""A worker's identity: a name that makes sense, and an id that stays the same over restarts of its one daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.core.errors import DuplicateName, InvalidOption
from cluster.platform.paths import hold_id, read_id

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@contextmanager
def identity(home: Path, name: str) -> Iterator[str]:
    """The id of the worker ``name`` on this machine, made at its first start; held until the context ends.

    Raises ``DuplicateName`` where a daemon of that name runs already, ``InvalidOption`` where the folder cannot be
    written.
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
            raise _unkept(folder, e) from e
        yield found


def id_of(home: Path, name: str) -> str:
    """The id of the worker ``name``, whether its daemon runs or not; raises ``InvalidOption``."""
    folder = _folder(home, name)
    try:
        return read_id(folder)
    except OSError as e:
        raise _unkept(folder, e) from e


def _folder(home: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InvalidOption(
            f"{name[:64]!r} cannot be a worker's name; use letters, digits, '.', '_' and '-', at most 63"
        )
    return home / "workers" / name


def _unkept(folder: Path, e: OSError) -> InvalidOption:
    return InvalidOption(f"cannot keep this worker's id in {folder}: {e.strerror}; set MACPIPE_HOME")
