"""``macpipe key create|list|revoke``: the API keys of the cluster that this Mac leads.

They edit a file that the running coordinator reads again; no coordinator has to run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Json
from cluster.platform.paths import state_home

if TYPE_CHECKING:
    from cluster.security.keys import ApiKey, KeyScope, KeyStore

BOUNDS: Final = ("requests/min", "tokens/min", "at once")
key = typer.Typer(name="key", help="Make, show and revoke API keys of the cluster's HTTP.", no_args_is_help=True)
InCluster = Annotated[str, typer.Option(help="Of this cluster.", envvar="MACPIPE_CLUSTER")]
Home = Annotated[Path | None, typer.Option(help="Where state is kept; else MACPIPE_HOME, else the usual place.")]
Bound = Annotated[int | None, typer.Option(min=1, show_default="no limit")]


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """A key for machines. Limits are null where there are none; times are seconds since the epoch."""

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
    """With the text, which is told this once."""

    key: str


@key.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for, or whose it is.")],
    scope: Annotated[str, typer.Option(help="inference, or admin: metrics, too.")] = "inference",
    requests_per_minute: Bound = None,
    tokens_per_minute: Bound = None,
    concurrency: Bound = None,
    cluster: InCluster = "default",
    home: Home = None,
    json: Json = False,
) -> None:
    """Make a key and print it; it is shown this once.

    Tokens are those of prompts and answers together. A running coordinator takes it at once.
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
        sys.stderr.write(f"keep it: it is not shown again. Take it back with `macpipe key revoke {name}`\n")


@key.command("list")
def show(cluster: InCluster = "default", home: Home = None, json: Json = False) -> None:
    """Show the keys, never their secrets."""
    with errors_in_json(json):
        known = keys_of(cluster, home).all_keys()
        if json:
            from cluster.cli.json_output import print_json

            print_json({"keys": [KeyFacts(**facts(one)) for one in known]})
        elif known:
            _table(known)
        else:
            sys.stdout.write("no keys; make one with `macpipe key create NAME`\n")


@key.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME|ID", help="As `macpipe key list` shows it.")],
    cluster: InCluster = "default",
    home: Home = None,
    json: Json = False,
) -> None:
    """Refuse a key from now on; answers to it that are under way end within seconds."""
    with errors_in_json(json):
        gone = keys_of(cluster, home).revoke(name)
        if json:
            from cluster.cli.json_output import print_json

            print_json(KeyFacts(**facts(gone)))
            return
        sys.stdout.write(f"{gone.name} ({gone.id}) is revoked\n")


def keys_of(cluster: str, home: Path | None) -> KeyStore:
    """The keys of a cluster that this Mac leads. Raises ``NoCluster``."""
    from cluster.core.errors import NoCluster
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.keys import KeyStore

    folder = ClusterFolder(state_home(home), cluster)
    if not folder.leads:
        raise NoCluster(
            f"this Mac does not lead a cluster named {cluster}, so it has no keys to give: make one with `macpipe"
            " init`, or ask on the Mac where that was done. Without a cluster HTTP needs no key, but is for this Mac"
            " alone"
        )
    return KeyStore(folder)


def check_scope(given: str) -> KeyScope:
    """Raises ``InvalidOption``."""
    from cluster.core.errors import InvalidOption
    from cluster.security.keys import KeyScope

    try:
        return KeyScope(given)
    except ValueError:
        raise InvalidOption(f"--scope is {given[:64]}; it must be {' or '.join(KeyScope)}", field="scope") from None


def facts(one: ApiKey) -> dict[str, Any]:
    """The fields of ``KeyFacts``."""
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


def _table(known: tuple[ApiKey, ...]) -> None:
    from datetime import datetime

    from cluster.cli.screen import console, printable, table

    shown = table("name", "scope", *BOUNDS, "made", "id", "", right=frozenset(BOUNDS))
    for one in known:
        bounds = (one.limits.requests_a_minute, one.limits.tokens_a_minute, one.limits.at_once)
        made = datetime.fromtimestamp(one.made).astimezone().strftime("%Y-%m-%d")
        state = "revoked" if one.revoked else ""
        told = ("-" if bound is None else str(bound) for bound in bounds)
        shown.add_row(*(printable(cell) for cell in (one.name, one.scope.value, *told, made, one.id, state)))
    console(sys.stdout).print(shown)
