"""Who a coordinator is to its workers: over restarts the same, so that they know whose slices they hold."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.core.errors import InvalidOption
from cluster.platform.paths import hold_id, read_id

log = logging.getLogger(__name__)


def state_folder(home: Path, cluster: str) -> Path:
    """Where the coordinator of a cluster keeps its state on this machine."""
    return home / "coordinators" / "".join(c if c.isalnum() or c in "-_." else "_" for c in cluster)


def id_of(home: Path, cluster: str) -> str:
    """The id of this machine's coordinator of ``cluster``, whether it runs or not; raises ``InvalidOption``."""
    folder = state_folder(home, cluster)
    try:
        return read_id(folder)
    except OSError as e:
        raise InvalidOption(f"cannot keep the coordinator's id in {folder}: {e.strerror}; set MACPIPE_HOME") from e


@contextmanager
def identity(home: Path | None, cluster: str) -> Iterator[str]:
    """The id of this machine's coordinator of ``cluster``, until the context ends.

    A second coordinator at the same time, and one that cannot keep a file, gets an id for this life alone: it serves
    as well, and only its successor is a stranger to the workers.
    """
    with ExitStack() as stack:
        found = ""
        if home is not None:
            try:
                found = stack.enter_context(hold_id(state_folder(home, cluster)))
            except OSError as e:
                log.info("this coordinator has an id for this life alone: %s", e.strerror)
        yield found or secrets.token_hex(8)
