"""``macpipe key create|list|revoke``: manages the API keys of the cluster that this Mac leads.

The commands edit a file that a running coordinator rereads. They work without a coordinator too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.help import Command
from cluster.cli.options import Cluster, Home, Json, open_folder

if TYPE_CHECKING:
    from cluster.cli.stored_edits import StandbyFacts
    from cluster.security.keys import ApiKey, KeyScope, KeyStore

BOUNDS: Final = ("requests/min", "tokens/min", "at once")
key = typer.Typer(name="key", help="Create, list and revoke the cluster's API keys for HTTP.", no_args_is_help=True)
RequestBound = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Maximum number of requests per minute.", show_default="no limit"),
]
TokenBound = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Maximum number of tokens per minute, in prompts and answers.", show_default="no limit"
    ),
]
LiveBound = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Maximum number of requests at once.", show_default="no limit")
]


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """A key as JSON. A limit is null if there is none; times are Unix seconds."""

    id: str
    name: str
    scope: str
    requests_a_minute: int | None
    tokens_a_minute: int | None
    at_once: int | None
    made: float
    revoked: float | None


@dataclass(frozen=True, slots=True)
class NewKey(KeyFacts):
    """A created key with its secret, which is shown only once."""

    key: str


@dataclass(frozen=True, slots=True)
class RevokedKey(KeyFacts):
    """A revoked key. ``standbys`` is null if no other coordinator is known."""

    standbys: StandbyFacts | None


@key.command(cls=Command)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The key's purpose or owner.")],
    scope: Annotated[
        str, typer.Option(metavar="SCOPE", help="inference, or admin, which also reads metrics.")
    ] = "inference",
    requests_per_minute: RequestBound = None,
    tokens_per_minute: TokenBound = None,
    concurrency: LiveBound = None,
    cluster: Cluster = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Create a key and print it; it is shown only once.

    A running coordinator accepts the key at once.
    """
    from cluster.security.keys import KeyLimits

    with errors_in_json(json):
        limits = KeyLimits(requests_per_minute, tokens_per_minute, concurrency)
        made, text = keys_of(cluster, home).create(name, check_scope(scope), limits)
        if json:
            from cluster.cli.json_output import print_json

            print_json(NewKey(**facts(made), key=text))
            return
        sys.stdout.write(f"{text}\n")
        sys.stderr.write(f"save this key: it is not shown again. Revoke it with `macpipe key revoke {name}`\n")


@key.command("list", cls=Command)
def show(cluster: Cluster = None, home: Home = None, json: Json = False) -> None:
    """List the keys without their secrets."""
    with errors_in_json(json):
        keys = keys_of(cluster, home).all_keys()
        if json:
            from cluster.cli.json_output import print_json

            print_json({"keys": [KeyFacts(**facts(one)) for one in keys]})
        elif keys:
            _print_table(keys)
        else:
            sys.stdout.write("no keys; create one with `macpipe key create NAME`\n")


@key.command(cls=Command)
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME|ID", help="The key's name or id, as in `macpipe key list`.")],
    cluster: Cluster = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Revoke a key; its running answers end within seconds.

    Waits a few seconds for the standbys to store it.
    """
    from cluster.cli.stored_edits import confirm_keys, print_standbys

    with errors_in_json(json):
        revoked = keys_of(cluster, home).revoke(name)
        standbys = confirm_keys(open_folder(home, cluster))
        if json:
            from cluster.cli.json_output import print_json

            print_json(RevokedKey(**facts(revoked), standbys=standbys))
            return
        sys.stdout.write(f"{revoked.name} ({revoked.id}) is revoked\n")
        print_standbys(standbys)


def keys_of(cluster: str | None, home: Path | None) -> KeyStore:
    """Return the key store of a cluster whose authority is on this Mac.

    Raises NoCluster if this Mac is in no such cluster, and AuthorityElsewhere if the authority is on another Mac.
    """
    from cluster.core.errors import AuthorityElsewhere, NoCluster
    from cluster.security.authority import find_holder
    from cluster.security.keys import KeyStore

    folder = open_folder(home, cluster)
    if not folder.exists:
        raise NoCluster(
            f"this Mac is in no cluster named {folder.cluster}, so it has no API keys: create one with `macpipe init`."
            " Without a cluster, HTTP needs no key but accepts only this Mac"
        )
    holder = find_holder(folder)
    if not holder.here:
        raise AuthorityElsewhere(f"{holder.problem(folder.cluster)}; run this command there", holder=holder.name)
    return KeyStore(folder)


def check_scope(given: str) -> KeyScope:
    """Parse a scope. Raise InvalidOption."""
    from cluster.core.errors import InvalidOption
    from cluster.security.keys import KeyScope

    try:
        return KeyScope(given)
    except ValueError:
        raise InvalidOption(f"--scope is {given[:64]}; it must be {' or '.join(KeyScope)}", field="scope") from None


def facts(one: ApiKey) -> dict[str, Any]:
    """Return the fields of ``KeyFacts``."""
    limits = one.limits
    return {
        "id": one.id,
        "name": one.name,
        "scope": one.scope.value,
        "requests_a_minute": limits.requests_a_minute,
        "tokens_a_minute": limits.tokens_a_minute,
        "at_once": limits.at_once,
        "made": one.made,
        "revoked": one.revoked,
    }


def _print_table(keys: tuple[ApiKey, ...]) -> None:
    from datetime import datetime

    from cluster.cli.screen import console, printable, table

    shown = table("name", "scope", *BOUNDS, "made", "id", "", right=frozenset(BOUNDS))
    for one in keys:
        bounds = (one.limits.requests_a_minute, one.limits.tokens_a_minute, one.limits.at_once)
        made = datetime.fromtimestamp(one.made).astimezone().strftime("%Y-%m-%d")
        state = "revoked" if one.revoked else ""
        limits = ("-" if bound is None else str(bound) for bound in bounds)
        shown.add_row(*(printable(cell) for cell in (one.name, one.scope.value, *limits, made, one.id, state)))
    console(sys.stdout).print(shown)
