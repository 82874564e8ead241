"""``macpipe init``: creates a cluster that other Macs can join."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.join_watch import JoinHost, JoinPort
from cluster.cli.options import Home, Json, NewCluster
from cluster.platform.paths import short_host_name, state_home

if TYPE_CHECKING:
    from cluster.security.cluster_creation import CreatedCluster
    from cluster.security.tokens import JoinToken

MAX_MACS = 64


def init(
    other_macs: Annotated[
        int,
        typer.Option(
            "--macs", metavar="N", min=0, max=MAX_MACS, help="Print this many join tokens, one per other Mac."
        ),
    ] = 1,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="This Mac's name in the cluster.", show_default="the host's name")
    ] = None,
    cluster: NewCluster = "default",
    wait: Annotated[bool, typer.Option(help="Keep running and admit Macs until all have joined.")] = True,
    host: JoinHost = "",
    join_port: JoinPort = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Create a cluster that this Mac leads.

    From then on every connection is encrypted, and only members can connect. Prints the commands for the other Macs.
    """
    from cluster.coordinator.identity import read_coordinator_id
    from cluster.platform.private_files import protect_home
    from cluster.security.cluster_choice import remember_cluster
    from cluster.security.cluster_creation import create_cluster
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.keys import KeyScope, KeyStore
    from cluster.security.roles import Role
    from cluster.security.tokens import TokenStore
    from cluster.worker.identity import read_worker_id

    with errors_in_json(json):
        folder = ClusterFolder(state_home(home), cluster)
        member_name = name or short_host_name()
        protect_home(folder.home)
        coordinator = read_coordinator_id(folder.home, cluster)
        ids = {
            Role.COORDINATOR: coordinator,
            Role.WORKER: read_worker_id(folder.home, member_name),
            Role.ADMIN: coordinator,
        }
        made = create_cluster(folder, member_name, ids)
        remember_cluster(folder.home, cluster)
        tokens = [TokenStore(folder).issue(made.fingerprint, Role.WORKER) for _ in range(other_macs)]
        _, key = KeyStore(folder).create("first", KeyScope.ADMIN)
        _print_result(folder.cluster, made, tokens, key, json)
        if tokens and wait:
            from cluster.cli.join_watch import admit

            raise typer.Exit(admit(folder, tokens, host, join_port))


def _print_result(cluster: str, made: CreatedCluster, tokens: list[JoinToken], key: str, json: bool) -> None:
    if json:
        from cluster.cli.json_output import print_json

        print_json({**_cluster_as_json(cluster, made, tokens), "api_key": key})
    else:
        sys.stdout.write("\n".join([*_headline(cluster, made), *_what_next(cluster, tokens), *_http(key)]) + "\n")
    sys.stdout.flush()


def _cluster_as_json(cluster: str, made: CreatedCluster, tokens: list[JoinToken]) -> dict[str, Any]:
    here = [{"role": party.role.value, "name": party.name, "id": party.id} for party in made.parties]
    facts = {"cluster": cluster, "cluster_id": made.cluster_id, "fingerprint": made.fingerprint.hex(), "members": here}
    return facts | {"tokens": [{"id": token.id, "role": token.role.value, "token": token.text} for token in tokens]}


def _headline(cluster: str, made: CreatedCluster) -> list[str]:
    who = [f"  {party.role:<12} {party.name}" for party in made.parties]
    return [f"created cluster {cluster}, led by this Mac ({made.cluster_id}):", *who, ""]


def _what_next(cluster: str, tokens: list[JoinToken]) -> list[str]:
    option = "" if cluster == "default" else f" --cluster {cluster}"
    if not tokens:
        return ["`macpipe token create` admits another Mac."]
    others = "the other Mac" if len(tokens) == 1 else f"the {len(tokens)} other Macs, one line on each"
    return [
        f"Within an hour, on {others}:",
        "",
        *(f"macpipe join {token.text}" for token in tokens),
        "",
        f"Then `macpipe worker{option}` on every Mac, and here `macpipe serve MODEL{option}`.",
    ]


def _http(key: str) -> list[str]:
    return ["", "HTTP now requires an API key. This one has admin scope and is shown only once:", "", key]
