"""``macpipe leave``: takes this Mac out of a cluster."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Home, Json, open_folder

if TYPE_CHECKING:
    from cluster.security.cluster_folder import ClusterFolder


def leave(
    disband: Annotated[
        bool, typer.Option("--disband", help="On the Mac that leads the cluster: end the cluster for all.")
    ] = False,
    cluster: Cluster = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Take this Mac out of a cluster.

    Deletes its certificates and keys. Models and measured speeds stay. Stop the Mac's worker or coordinator first.
    """
    from cluster.security.cluster_departure import leave_cluster

    with errors_in_json(json), ExitStack() as stack:
        folder = open_folder(home, cluster)
        _hold_daemons(stack, folder)
        names = leave_cluster(folder, disband=disband)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"cluster": folder.cluster, "members": names, "disbanded": disband})
            return
        sys.stdout.write(f"this Mac has left the cluster {folder.cluster}\n")
        if names and not disband:
            removals = " and ".join(f"`macpipe remove {name}`" for name in names)
            sys.stdout.write(f"on the coordinator's Mac, {removals} takes it off the list\n")


def _hold_daemons(stack: ExitStack, folder: ClusterFolder) -> None:
    """Hold the ids of this Mac's workers and coordinator in the cluster. Raise Busy if one of them runs."""
    from cluster.coordinator.identity import state_folder
    from cluster.core.errors import Busy, DuplicateName
    from cluster.platform.paths import hold_id
    from cluster.worker.identity import hold_identity

    if folder.coordinates:
        try:
            stack.enter_context(hold_id(state_folder(folder.home, folder.cluster)))
        except BlockingIOError:
            raise Busy("the coordinator still runs on this Mac; stop it and try again") from None
    for name in folder.list_workers():
        try:
            stack.enter_context(hold_identity(folder.home, name))
        except DuplicateName:
            raise Busy(f"the worker {name} still runs on this Mac; stop it and try again") from None
