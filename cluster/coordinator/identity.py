"""Give a coordinator an id that survives restarts, so that its workers know whose slices they hold."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.core.errors import InvalidOption
from cluster.platform.paths import hold_id, read_id
from cluster.platform.private_files import CHOOSE_FOLDER

log = logging.getLogger(__name__)


def state_folder(home: Path, cluster: str) -> Path:
    """Return the folder for the state of a cluster's coordinator on this machine."""
    return home / "coordinators" / "".join(c if c.isalnum() or c in "-_." else "_" for c in cluster)


def read_coordinator_id(home: Path, cluster: str) -> str:
    """Return the id of this machine's coordinator of ``cluster``, running or not.

    Raises ``InvalidOption`` if the id cannot be stored.
    """
    folder = state_folder(home, cluster)
    try:
        return read_id(folder)
    except OSError as e:
        raise InvalidOption(f"cannot keep the coordinator's id in {folder}: {e.strerror}; {CHOOSE_FOLDER}") from e


@contextmanager
def hold_identity(home: Path | None, cluster: str) -> Iterator[str]:
    """Yield the id of this machine's coordinator of ``cluster``, and hold it until the context ends.

    A second coordinator at the same time, or one that cannot store a file, gets an id for this process only. It serves
    like any other, but the workers will not recognize it after a restart.
    """
    with ExitStack() as stack:
        found = ""
        if home is not None:
            try:
                found = stack.enter_context(hold_id(state_folder(home, cluster)))
            except OSError as e:
                log.info("identity: id is valid for this process only reason=%s", e.strerror)
        yield found or secrets.token_hex(8)
