"""``macpipe join TOKEN``: bring this Mac into a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Json
from cluster.core.errors import InvalidOption
from cluster.platform.paths import short_host_name, state_home
from cluster.security.bounds import MAX_TOKEN_CHARS

if TYPE_CHECKING:
    from cluster.joining.client import Joined
    from cluster.security.tokens import JoinToken

STDIN = "-"


def join(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="What `macpipe init` or `macpipe token create` printed; - reads it.")
    ],
    name: Annotated[
        str | None, typer.Option(help="This Mac's name in the cluster.", show_default="the host's name")
    ] = None,
    peer: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help="The coordinator's Mac, where it cannot be discovered.")
    ] = "",
    cluster: Annotated[
        str, typer.Option(metavar="NAME", envvar="MACPIPE_CLUSTER", help="Call it this here.", show_default="its name")
    ] = "",
    json: Json = False,
    home: Annotated[Path | None, typer.Option(help="Keep keys here; else MACPIPE_HOME.")] = None,
) -> None:
    """Bring this Mac into a cluster.

    Finds the coordinator, makes sure that it is the one the token is from, and gets a certificate. The key stays here.
    """
    if token != STDIN:
        _hide(token)
    from cluster.security.tokens import JoinToken

    with errors_in_json(json):
        parsed = JoinToken.parse(_read() if token == STDIN else token)
        joined = _join(parsed, name or short_host_name(), peer, cluster, state_home(home))
        _tell(joined, json)


def _join(token: JoinToken, machine: str, peer: str, cluster: str, home: Path) -> Joined:
    import secrets

    import anyio

    from cluster.cli.screen import note
    from cluster.joining.client import JoinOrder, join
    from cluster.platform.private_files import protect_home
    from cluster.security.cluster_creation import name_for_role
    from cluster.security.roles import Role
    from cluster.worker.identity import id_of

    name = name_for_role(token.role, machine)
    protect_home(home)
    own_id = id_of(home, name) if token.role is Role.WORKER else secrets.token_hex(8)
    note(f"looking for the coordinator of cluster {token.cluster_id}" if not peer else f"asking {peer}")
    return anyio.run(join, JoinOrder(home, token, own_id, name, peer, cluster))


def _tell(joined: Joined, json: bool) -> None:
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
    said = f"{party.name} is {'an' if party.role == 'admin' else 'a'} {party.role} of cluster {joined.cluster} now"
    sys.stdout.write(printable(f"{said}; {_what_next(joined)}\n"))


def _what_next(joined: Joined) -> str:
    cluster = "" if joined.cluster == "default" else f" --cluster {joined.cluster}"
    if joined.party.role != "worker":
        return f"try `macpipe status{cluster}`"
    name = "" if joined.party.name == short_host_name() else f" --name {joined.party.name}"
    return f"start it with `macpipe worker{name}{cluster}`"


def _read() -> str:
    """A token from stdin: piped, or typed."""
    if sys.stdin.isatty():
        sys.stderr.write("token: ")
        sys.stderr.flush()
    line = sys.stdin.readline(1024).strip()
    if not line:
        raise InvalidOption("no join token came on stdin", field="token")
    return line


def _hide(token: str) -> None:
    """Become the same command with the token on stdin: everybody on this machine can read what a process was given."""
    words = [STDIN if word == token else word for word in sys.orig_argv]
    if not (token.strip() and len(token) <= MAX_TOKEN_CHARS and words != sys.orig_argv and sys.executable):
        return
    reader, writer = os.pipe()
    os.write(writer, f"{token.strip()}\n".encode())
    os.close(writer)
    os.dup2(reader, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words[1:]])  # noqa: S606  # no shell: the words are this process's own
