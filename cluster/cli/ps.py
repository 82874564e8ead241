"""``macpipe ps``: the requests that are live."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from cluster.cli.edge import errors_in_json
from cluster.cli.options import Coordinator, Json

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.client import LiveRequest

RIGHT: Final = frozenset({"prompt", "answer", "lane", "age"})


def ps(coordinator: Coordinator = None, json: Json = False) -> None:
    """Show the requests that are live."""
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator) as client:
        requests = client.cluster().requests
        if json:
            from cluster.cli.facts import print_json

            print_json({"requests": requests})
        elif requests:
            from cluster.cli.screen import console

            console(sys.stdout).print(_table(requests))
        else:
            sys.stdout.write("no live requests\n")


def _table(requests: tuple[LiveRequest, ...]) -> Table:
    from cluster.cli.screen import printable, seconds_in_words, table

    shown = table("request", "state", "prompt", "answer", "lane", "age", right=RIGHT)
    for one in requests:
        read = one.prompt_tokens == one.prefilled_tokens or one.completion_tokens > 0
        shown.add_row(
            printable(one.request_id),
            one.state,
            str(one.prompt_tokens) if read else f"{one.prefilled_tokens} of {one.prompt_tokens}",
            str(one.completion_tokens),
            "-" if one.lane is None else str(one.lane),
            seconds_in_words(one.age_seconds),
        )
    return shown
