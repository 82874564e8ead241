"""``macpipe init``: make a cluster, so that other Macs can be let in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.join_port import Cluster, JoinHost, JoinPort
from cluster.cli.options import Json
from cluster.platform.paths import short_host_name, state_home

if TYPE_CHECKING:
    from cluster.security.cluster_creation import CreatedCluster
    from cluster.security.tokens import JoinToken

MAX_MACS = 64


def init(
    macs: Annotated[int, typer.Option(min=0, max=MAX_MACS, help="Print as many tokens, each for one other Mac.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="This Mac's name in the cluster.", show_default="the host's name")
    ] = None,
    cluster: Cluster = "default",
    wait: Annotated[bool, typer.Option(help="Stay, and admit the Macs, until all have joined.")] = True,
    host: JoinHost = "",
    join_port: JoinPort = None,
    json: Json = False,
    home: Annotated[Path | None, typer.Option(help="Keep the cluster here; else MACPIPE_HOME.")] = None,
) -> None:
    """Make a cluster that this Mac leads.

    From then on every connection is encrypted, and only Macs that joined are heard. Prints what to type on the others.
    """
    from cluster.coordinator.identity import id_of as coordinator_id
    from cluster.platform.private_files import protect_home
    from cluster.security.cluster_creation import create_cluster
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.keys import KeyScope, KeyStore
    from cluster.security.roles import Role
    from cluster.security.tokens import TokenStore
    from cluster.worker.identity import id_of as worker_id

    with errors_in_json(json):
        folder, called = ClusterFolder(state_home(home), cluster), name or short_host_name()
        protect_home(folder.home)
        coordinator = coordinator_id(folder.home, cluster)
        ids = {Role.COORDINATOR: coordinator, Role.WORKER: worker_id(folder.home, called), Role.ADMIN: coordinator}
        made = create_cluster(folder, called, ids)
        tokens = [TokenStore(folder).issue(made.fingerprint, Role.WORKER) for _ in range(macs)]
        _, key = KeyStore(folder).create("first", KeyScope.ADMIN)
        _tell(folder.cluster, made, tokens, key, json)
        if tokens and wait:
            from cluster.cli.join_port import admit

            raise typer.Exit(admit(folder, tokens, host, join_port))


def _tell(cluster: str, made: CreatedCluster, tokens: list[JoinToken], key: str, json: bool) -> None:
    if json:
        from cluster.cli.json_output import print_json

        print_json({**_facts(cluster, made, tokens), "api_key": key})
    else:
        sys.stdout.write("\n".join([*_headline(cluster, made), *_what_next(cluster, tokens), *_http(key)]) + "\n")
    sys.stdout.flush()


def _facts(cluster: str, made: CreatedCluster, tokens: list[JoinToken]) -> dict[str, Any]:
    here = [{"role": party.role.value, "name": party.name, "id": party.id} for party in made.parties]
    facts = {"cluster": cluster, "cluster_id": made.cluster_id, "fingerprint": made.fingerprint.hex(), "members": here}
    return facts | {"tokens": [{"id": token.id, "role": token.role.value, "token": token.text} for token in tokens]}


def _headline(cluster: str, made: CreatedCluster) -> list[str]:
    who = [f"  {party.role:<12} {party.name}" for party in made.parties]
    return [f"cluster {cluster} is made, and this Mac leads it ({made.cluster_id}):", *who, ""]


def _what_next(cluster: str, tokens: list[JoinToken]) -> list[str]:
    option = "" if cluster == "default" else f" --cluster {cluster}"
    if not tokens:
        return ["`macpipe token create` admits another Mac."]
    others = "the other Mac" if len(tokens) == 1 else f"each of the {len(tokens)} other Macs, a line each"
    return [
        f"Within an hour, on {others}:",
        "",
        *(f"macpipe join {token.text}" for token in tokens),
        "",
        f"Then `macpipe worker{option}` on every Mac, and here `macpipe serve MODEL{option}`.",
    ]


def _http(key: str) -> list[str]:
    return ["", "HTTP asks for an API key now. This one opens all, and is shown this once:", "", key]
