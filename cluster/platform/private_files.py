"""Private files and folders: modes 0600 and 0700 whatever the umask, and files that are replaced atomically.

The module knows paths, modes and bytes. It does not know what a file is for.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from cluster.core.errors import DiskFull, InvalidOption, MacpipeError

log = logging.getLogger(__name__)

CHOOSE_FOLDER: Final = "choose a state folder that is yours with --home or MACPIPE_HOME"
"""What to do where the state folder cannot be used; every command that writes to it has ``--home``."""
OTHERS: Final = 0o077
"""Permissions of everybody but the owner."""
_WRITERS: Final = 0o022
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BROKEN: Final = frozenset({errno.EIO, errno.EROFS})
_STATE_FOLDERS: Final = frozenset(
    {"clusters", "coordinators", "digests", "launch", "logs", "manifests", "models", "workers"}
)
"""Everything that macpipe keeps directly in a state folder."""


def make_private_folder(path: Path, top: Path | None = None) -> None:
    """Create ``path`` and its missing parents with mode 0700.

    Existing folders from ``top`` down to ``path`` get that mode too; without ``top``, only ``path`` does. Raises
    OSError, also if a folder belongs to another user.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with suppress(FileExistsError):  # another process made it meanwhile
            folder.mkdir(mode=0o700)  # not parents=True, whose folders follow the umask
    for folder in (path, *path.parents):
        if not folder.is_relative_to(top or path):
            break
        if stat.S_IMODE(folder.stat().st_mode) & OTHERS:
            folder.chmod(0o700)


def protect_home(home: Path) -> None:
    """Create macpipe's state folder, or close it to other users if it contains only macpipe's files.

    Raises InvalidOption if other users can replace files in it. Failing to create it is not an error here: the first
    write reports it.
    """
    try:
        if not home.exists():
            make_private_folder(home)
        found = home.stat()
        mode = stat.S_IMODE(found.st_mode)
        if not mode & OTHERS or mode & stat.S_ISVTX:
            return  # other users can at most create files of their own
        if found.st_uid == os.geteuid() and _holds_state_alone(home):
            home.chmod(0o700)
            log.warning("state folder: removed access of other users path=%s mode_before=%03o", home, mode)
            return
    except OSError as e:
        log.info("state folder: cannot check permissions reason=%s path=%s", e.strerror, home)
        return
    if mode & _WRITERS:
        raise InvalidOption(
            f"other users of this machine can replace files in {home} (mode {mode:03o}); run `chmod 700 {home}`, or"
            f" {CHOOSE_FOLDER}"
        )


def _holds_state_alone(home: Path) -> bool:
    return all(name in _STATE_FOLDERS or name.startswith(".") for name in os.listdir(home))  # noqa: PTH208


def create_private_file(path: Path) -> int:
    """Create an empty file for appending, in place of anything that exists there, and return its descriptor.

    Follows no link. Raises OSError.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def open_regular_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; refuses links, pipes and devices. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(file, "rb")


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write all of ``data``, in as many writes as needed. Raises OSError, possibly after writing a part."""
    left = memoryview(data)
    while left:
        written = os.write(file, left)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[written:]


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` in ``path``, whole and on disk, or leave what is there. Raises OSError."""
    os.close(replace_and_open(path, content, path.with_name(f".{path.name}.{secrets.token_hex(4)}")))


def replace_and_open(path: Path, content: bytes, fresh: Path) -> int:
    """Write ``content`` to ``fresh``, rename that to ``path``, and return a descriptor for appending to ``path``.

    Raises OSError; ``path`` is then what it was.
    """
    file = create_private_file(fresh)
    try:
        write_all(file, content)
        os.fsync(file)
        fresh.replace(path)
        sync_folder(path.parent)
    except BaseException:
        os.close(file)
        fresh.unlink(missing_ok=True)
        raise
    return file


def not_written(error: OSError, path: Path, what: str, advice: str = CHOOSE_FOLDER) -> MacpipeError:
    """Return the error for a failed write to ``path``: DiskFull for a fault of the disk, else InvalidOption.

    ``advice`` says what to do where the disk is not to blame.
    """
    why = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return DiskFull(f"cannot write {what} to {path}: {why}; free some room there and try again", path=str(path))
    if error.errno in _BROKEN:
        return DiskFull(f"cannot write {what} to {path}: {why}; check that disk, then try again", path=str(path))
    return InvalidOption(f"cannot write {what} to {path}: {why}; {advice}")


def sync_folder(folder: Path) -> None:
    """Sync ``folder``, so that renames in it survive a power failure."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(file)
    finally:
        os.close(file)
