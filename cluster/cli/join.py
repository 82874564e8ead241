"""``macpipe join TOKEN``: adds this Mac to a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Home, Json
from cluster.core.errors import InvalidOption
from cluster.platform.paths import short_host_name, state_home
from cluster.security.limits import MAX_TOKEN_CHARS

if TYPE_CHECKING:
    from cluster.joining.client import Joined
    from cluster.security.tokens import JoinToken

STDIN = "-"


def join(
    token: Annotated[
        str,
        typer.Argument(metavar="TOKEN", help="From `macpipe init` or `macpipe token create`; - reads standard input."),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="This Mac's name in the cluster.", show_default="the host's name")
    ] = None,
    peer: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help="The coordinator's Mac, if it cannot be discovered.")
    ] = "",
    cluster: Annotated[
        str,
        typer.Option(
            metavar="NAME", envvar="MACPIPE_CLUSTER", help="The cluster's name on this Mac.", show_default="its name"
        ),
    ] = "",
    json: Json = False,
    home: Home = None,
) -> None:
    """Add this Mac to a cluster.

    Finds the coordinator, verifies that it issued the token, and gets a certificate. The private key stays here.
    """
    if token != STDIN:
        _hide_token(token)
    from cluster.security.tokens import JoinToken

    with errors_in_json(json):
        parsed = JoinToken.parse(_read_token() if token == STDIN else token)
        joined = _join(parsed, name or short_host_name(), peer, cluster, state_home(home))
        _print_result(joined, json)


def _join(token: JoinToken, machine: str, peer: str, cluster: str, home: Path) -> Joined:
    import secrets

    import anyio

    from cluster.cli.screen import note
    from cluster.joining.client import JoinOrder, join
    from cluster.platform.private_files import protect_home
    from cluster.security.cluster_creation import name_for_role
    from cluster.security.roles import Role
    from cluster.worker.identity import read_worker_id

    name = name_for_role(token.role, machine)
    protect_home(home)
    own_id = read_worker_id(home, name) if token.role is Role.WORKER else secrets.token_hex(8)
    note(f"looking for the coordinator of cluster {token.cluster_id}" if not peer else f"asking {peer}")
    return anyio.run(join, JoinOrder(home, token, own_id, name, peer, cluster))


def _print_result(joined: Joined, json: bool) -> None:
    from cluster.cli.json_output import print_json
    from cluster.cli.screen import note, printable

    if joined.warning:
        note(f"warning: {joined.warning}")
    party = joined.party
    if json:
        facts = {"cluster": joined.cluster, "cluster_id": party.cluster_id, "role": party.role.value}
        more = {"name": party.name, "id": party.id, "coordinator": joined.address}
        print_json(facts | more | {"clock_ahead_seconds": round(joined.clock_ahead_s, 1)})
        return
    outcome = f"{party.name} is {'an' if party.role == 'admin' else 'a'} {party.role} of cluster {joined.cluster} now"
    sys.stdout.write(printable(f"{outcome}; {_what_next(joined)}\n"))


def _what_next(joined: Joined) -> str:
    cluster = "" if joined.cluster == "default" else f" --cluster {joined.cluster}"
    if joined.party.role == "coordinator":
        return f"start it with `macpipe serve --standby{cluster}`"
    if joined.party.role != "worker":
        return f"try `macpipe status{cluster}`"
    name = "" if joined.party.name == short_host_name() else f" --name {joined.party.name}"
    return f"start it with `macpipe worker{name}{cluster}`"


def _read_token() -> str:
    """Read a token from stdin, a pipe or a terminal. Raise InvalidOption if there is none."""
    if sys.stdin.isatty():
        sys.stderr.write("token: ")
        sys.stderr.flush()
    line = sys.stdin.readline(1024).strip()
    if not line:
        raise InvalidOption(
            "no join token on standard input; paste the line that `macpipe token create` prints", field="token"
        )
    return line


def _hide_token(token: str) -> None:
    """Re-execute this command with the token on stdin: every user of this machine can read a process's arguments."""
    words = [STDIN if word == token else word for word in sys.orig_argv]
    if not (token.strip() and len(token) <= MAX_TOKEN_CHARS and words != sys.orig_argv and sys.executable):
        return
    reader, writer = os.pipe()
    os.write(writer, f"{token.strip()}\n".encode())
    os.close(writer)
    os.dup2(reader, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words[1:]])  # noqa: S606  # no shell: the arguments are this process's own
