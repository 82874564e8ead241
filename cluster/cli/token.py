"""``macpipe token create|list|revoke``: manages join tokens."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.join_watch import JoinHost, JoinPort
from cluster.cli.options import Cluster, Home, Json, open_folder
from cluster.core.errors import InvalidOption
from cluster.core.text import duration_in_words, parse_duration

if TYPE_CHECKING:
    from cluster.security.tokens import IssuedToken, JoinToken

token = typer.Typer(
    name="token",
    help="Create, list and revoke join tokens.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@token.command(cls=Command)
def create(
    role: Annotated[
        str,
        typer.Option(
            metavar="ROLE",
            help="The Mac's role: worker, client (sends requests), admin (also loads models) or coordinator.",
        ),
    ] = "worker",
    ttl: Annotated[str, typer.Option(metavar="DURATION", help="Lifetime, like 30m, 2h or 1d.")] = "1h",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Keep running and admit the Mac until it has joined.")
    ] = False,
    host: JoinHost = "",
    join_port: JoinPort = None,
    cluster: Cluster = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Create a join token for one Mac.

    A running `macpipe serve` on this Mac accepts it; if none runs, use --wait.
    """
    from cluster.security.authority import Authority
    from cluster.security.tokens import TokenStore

    with errors_in_json(json):
        folder = open_folder(home, cluster)
        seconds = parse_duration(ttl, "--ttl")
        made = TokenStore(folder).issue(Authority.load(folder).fingerprint, _role(role), seconds)
        _print_token(made, seconds, json)
        if wait:
            from cluster.cli.join_watch import admit

            raise typer.Exit(admit(folder, [made], host, join_port))


@token.command(name="list", cls=Command)
def show(cluster: Cluster = None, json: Json = False, home: Home = None) -> None:
    """List join tokens without their secrets.

    Ended tokens are listed for a day.
    """
    from cluster.security.authority import Authority
    from cluster.security.tokens import TokenStore

    with errors_in_json(json):
        folder = open_folder(home, cluster)
        Authority.load(folder)
        known = TokenStore(folder).all_tokens()
        now = time.time()
        if json:
            from cluster.cli.json_output import print_json

            print_json({"tokens": [_token_as_json(one, now) for one in known]})
        elif known:
            _print_table(known, now)
        else:
            sys.stdout.write("no join tokens; create one with `macpipe token create`\n")


@token.command(cls=Command)
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as in `macpipe token list`.")],  # noqa: A002
    cluster: Cluster = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Revoke a join token; a Mac that used it stays a member."""
    from cluster.security.authority import Authority
    from cluster.security.tokens import TokenStore

    with errors_in_json(json):
        folder = open_folder(home, cluster)
        Authority.load(folder)
        ended = TokenStore(folder).revoke(id)
        if json:
            from cluster.cli.json_output import print_json

            print_json(_token_as_json(ended, time.time()))
            return
        joined = f"; {ended.user} joined with it and stays a member" if ended.used is not None else ""
        sys.stdout.write(f"token {ended.id} is revoked{joined}\n")


def _role(written: str) -> Any:
    from cluster.security.tokens import JOINERS

    found = next((role for role in JOINERS if role.value == written), None)
    if found is None:
        raise InvalidOption(f"--role is {written!r}; it must be {', '.join(JOINERS[:-1])} or {JOINERS[-1]}")
    return found


def _print_token(made: JoinToken, seconds: float, json: bool) -> None:
    from cluster.cli.screen import note

    if json:
        from cluster.cli.json_output import print_json

        facts = {"id": made.id, "role": made.role.value, "token": made.text, "cluster_id": made.cluster_id}
        print_json(facts | {"ttl_seconds": seconds})
    else:
        sys.stdout.write(f"macpipe join {made.text}\n")
        note(f"valid for one {made.role}, for {duration_in_words(seconds)}, while `macpipe serve` runs here")
    sys.stdout.flush()


def _token_as_json(one: IssuedToken, now: float) -> dict[str, Any]:
    times = {"created": one.issued, "expires": one.expires, "used": one.used, "revoked": one.revoked}
    return {"id": one.id, "role": one.role.value, "state": one.state(now).value, "member": one.user or None} | times


def _print_table(known: tuple[IssuedToken, ...], now: float) -> None:
    from cluster.cli.screen import console, printable, table

    shown = table("token", "role", "made", "state")
    for one in known:
        ago = f"{duration_in_words(now - one.issued)} ago"
        shown.add_row(one.id, one.role.value, ago, printable(_state(one, now)))
    console(sys.stdout).print(shown)


def _state(one: IssuedToken, now: float) -> str:
    from cluster.security.tokens import TokenState

    match one.state(now):
        case TokenState.OPEN:
            return f"open for {duration_in_words(one.expires - now)}"
        case TokenState.USED:
            return f"used by {one.user}"
        case TokenState.REVOKED if one.used is not None:
            return f"revoked; used by {one.user}"
        case ended:
            return ended.value
