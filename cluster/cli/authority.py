"""``macpipe authority show|move``: where the cluster's certificate authority is, and its move to another Mac."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.options import Cluster, Coordinator, Home, Json, open_folder, require_coordinator

if TYPE_CHECKING:
    from cluster.core.leadership import LeadershipState
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.members import Member

authority = typer.Typer(
    name="authority",
    help="Show where the cluster's authority is, or move it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@authority.command(cls=Command)
def show(cluster: Cluster = None, json: Json = False, home: Home = None) -> None:
    """Show which coordinator holds the authority.

    Says until when all goes on without it. Run it on the Mac of any coordinator.
    """
    from cluster.security.authority import find_holder

    with errors_in_json(json):
        folder = open_folder(home, cluster)
        require_coordinator(folder)
        holder = find_holder(folder)
        if json:
            from cluster.cli.json_output import print_json

            facts = {"cluster": folder.cluster, "holder": holder.name or None, "here": holder.here}
            print_json(facts | {"first_certificate_ends": holder.first_end})
            return
        here = ", this Mac's coordinator" if holder.here else ""
        sys.stdout.write(f"{holder.name or 'an unknown coordinator'}{here}, holds the authority of {folder.cluster}\n")
        if holder.first_end is not None:
            day = time.strftime("%Y-%m-%d", time.localtime(holder.first_end))
            sys.stdout.write(f"without it no Mac can join, and the first certificate ends {day}\n")


@authority.command(cls=Command)
def move(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The other Mac or its coordinator, as in `macpipe members`.")
    ],
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where that coordinator listens, if `macpipe status` cannot tell.")
    ] = "",
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Move the authority from this Mac to another.

    A coordinator must run there. The key is encrypted for that Mac, and deleted here. From then on that Mac admits
    others and renews certificates, also while it stands by.
    """
    from cluster.security.authority import Authority
    from cluster.security.authority_move import find_target

    with errors_in_json(json):
        folder = open_folder(None, cluster)
        require_coordinator(folder)
        Authority.load(folder)
        target = find_target(folder, name)
        _move(folder, target, address, coordinator)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"cluster": folder.cluster, "holder": target.name})
            return
        sys.stdout.write(f"{target.name} holds the authority of {folder.cluster} now; its key was deleted here\n")


def _move(folder: ClusterFolder, target: Member, address: str, coordinator: str | None) -> None:
    import anyio

    from cluster.client import Client
    from cluster.client.authority_transfer import move_authority
    from cluster.client.coordinator_address import parse_coordinator
    from cluster.security.credentials import open_trust
    from cluster.security.trust import COORDINATOR

    with Client(coordinator, cluster=folder.cluster) as client:
        leadership = client.cluster().leadership
    leader = leadership.leader if leadership else None
    addresses = [parse_coordinator(address, "--address")] if address else _known_addresses(leadership)
    trust = open_trust(folder.home, folder.cluster, COORDINATOR)
    anyio.run(move_authority, folder, trust, target, addresses, leader.addresses if leader else ())


def _known_addresses(leadership: LeadershipState | None) -> list[str]:
    """Return the addresses of the leader and its standbys."""
    if leadership is None:
        return []
    leader = leadership.leader.addresses if leadership.leader else ()
    return [*leader, *(address for standby in leadership.standbys for address in standby.addresses)]
