"""Remembers the cluster that this machine entered last, and where the coordinator of each of its clusters listens.

Both records are hints: TLS checks who answers. A record that is missing or damaged counts as none, and one that cannot
be written is only logged. The module imports neither cryptography nor grpc, for which other commands need not wait.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.core.limits import KIB
from cluster.core.text import format_address, parse_address
from cluster.platform.json_file import read_json, write_json
from cluster.platform.paths import short_host_name
from cluster.security.name_check import check_name

log = logging.getLogger(__name__)

CLUSTER_VARIABLE: Final = "MACPIPE_CLUSTER"
DEFAULT_CLUSTER: Final = "default"
MAX_RECORD_BYTES: Final = 4 * KIB


def is_member(home: Path, cluster: str) -> bool:
    """Return whether this machine is in the cluster."""
    return (home / "clusters" / cluster / "authority.pem").is_file()


def worker_names(home: Path, cluster: str) -> list[str]:
    """Return the names under which this machine is a worker of the cluster, sorted."""
    certificates = (home / "clusters" / cluster / "workers").glob("*/certificate.pem")
    return sorted(certificate.parent.name for certificate in certificates)


def choose_worker_name(given: str | None, home: Path, cluster: str) -> str:
    """Return ``given``, else the name under which this machine is the only worker of ``cluster``, else the host's.

    Raises ``InvalidOption`` if this machine is a worker of the cluster, but not by that name.
    """
    known = worker_names(home, cluster)
    name = given if given is not None else known[0] if len(known) == 1 else short_host_name()
    if known and name not in known:
        raise InvalidOption(
            f"this Mac is a worker of cluster {cluster} as {' and '.join(known)}, not as {name};"
            f" give --name {known[0]}, or let another worker join with `macpipe join TOKEN --name NAME`",
            field="name",
        )
    return name


def resolve_cluster(given: str | None, home: Path) -> str:
    """Return ``given``, else ``MACPIPE_CLUSTER``, else the cluster that this machine entered last, else ``default``.

    A remembered cluster counts only while this machine is a member. Raises ``InvalidOption`` for an invalid name.
    """
    if named := given or os.environ.get(CLUSTER_VARIABLE):
        return check_name(named, "a cluster's")
    remembered = _read_text(home / "last-cluster.json", "cluster")
    try:
        known = bool(remembered) and is_member(home, check_name(remembered, "a cluster's"))
    except InvalidOption:
        known = False
    return remembered if known else DEFAULT_CLUSTER


def remember_cluster(home: Path, cluster: str) -> None:
    """Remember ``cluster`` as the one that this machine entered last."""
    _write(home / "last-cluster.json", {"cluster": cluster})


def remembered_coordinator(home: Path, cluster: str) -> str | None:
    """Return the ``host:port`` of the cluster's coordinator, as remembered; None if none is."""
    address = _read_text(_coordinator_file(home, cluster), "address")
    try:
        return format_address(*parse_address(address)) if address else None
    except InvalidOption:
        return None


def remember_coordinator(home: Path, cluster: str, address: str) -> None:
    """Remember that the cluster's coordinator listens on ``address``. Does nothing if this is known."""
    if address != remembered_coordinator(home, cluster):
        _write(_coordinator_file(home, cluster), {"address": address})


def _coordinator_file(home: Path, cluster: str) -> Path:
    return home / "clusters" / check_name(cluster, "a cluster's") / "coordinator.json"


def _read_text(path: Path, name: str) -> str:
    try:
        content = read_json(path, MAX_RECORD_BYTES)
    except (OSError, ValueError):
        return ""
    value = content.get(name) if isinstance(content, Mapping) else None
    return value if isinstance(value, str) else ""


def _write(path: Path, record: Mapping[str, str]) -> None:
    try:
        write_json(path, dict(record))
    except OSError as e:
        log.warning("cluster: cannot remember it for later commands reason=%s path=%s", e.strerror, path)
