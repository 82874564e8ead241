"""``macpipe members``: lists the cluster's members, from the files of the coordinator's Mac."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Home, Json, open_folder, require_coordinator

if TYPE_CHECKING:
    from cluster.security.members import Member


def members(
    everyone: Annotated[bool, typer.Option("--all", help="Include removed members.")] = False,
    cluster: Cluster = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """List the members of the cluster, on the Mac of any coordinator."""
    from cluster.security.authority import read_authority
    from cluster.security.members import Members

    with errors_in_json(json):
        folder = open_folder(home, cluster)
        require_coordinator(folder)
        cluster_id = read_authority(folder.authority.read_bytes()).cluster_id
        roster = Members(folder)
        known = roster.all_members() if everyone else roster.current()
        if json:
            from cluster.cli.json_output import print_json

            print_json(
                {
                    "cluster": folder.cluster,
                    "cluster_id": cluster_id,
                    "members": [_member_as_json(one) for one in known],
                }
            )
        else:
            _print_table(known)


def _member_as_json(one: Member) -> dict[str, Any]:
    until = max((issued.not_after for issued in one.issued), default=None)
    facts = {"name": one.name, "role": one.role.value, "id": one.id, "since": one.since}
    return facts | {"certificate_until": until, "removed": one.removed}


def _print_table(known: tuple[Member, ...]) -> None:
    from cluster.cli.screen import console, printable, table

    shown = table("name", "role", "id", "since", "certificate")
    for one in known:
        shown.add_row(printable(one.name), one.role.value, one.id, _day(one.since), _certificate(one))
    console(sys.stdout).print(shown)


def _certificate(one: Member) -> str:
    until = max((issued.not_after for issued in one.issued), default=0.0)
    if one.removed is not None:
        return f"removed {_day(one.removed)}"
    return f"until {_day(until)}" if until > time.time() else f"ended {_day(until)}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
