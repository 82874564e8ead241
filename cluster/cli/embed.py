"""``macpipe embed``: prints the embeddings of texts as JSON."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.options import Cluster, Coordinator, Timeout
from cluster.core.errors import InvalidOption


def embed(
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="The texts.", show_default="the lines of standard input that are not empty"
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Embed with this model.", show_default="the default one")
    ] = "",
    dimensions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep only the first N numbers of each, for models trained for that.",
            show_default="all",
        ),
    ] = None,
    timeout: Timeout = None,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
) -> None:
    """Print the embeddings of texts as one JSON object.

    It has the name of the model, a vector for each text in their order, and the number of tokens of all texts.
    """
    from cluster.cli.json_output import print_json
    from cluster.client import Client

    texts = _read_texts(text or [])
    with Client(coordinator, cluster=cluster, timeout_s=timeout) as client:
        print_json(client.embed(texts, model=model, dimensions=dimensions))


def _read_texts(given: list[str]) -> list[str]:
    """Return the texts of the command line, else the lines of standard input. Raise InvalidOption if there are none."""
    from cluster.cli.chat import read_piped_lines
    from cluster.cli.generate import require_utf8

    if given:
        return [require_utf8(one, f"text {number}", "text") for number, one in enumerate(given, start=1)]
    texts = [] if sys.stdin.isatty() else [line for line in read_piped_lines() if line.strip()]
    if not texts:
        raise InvalidOption("there is no text; name some, or pipe in a text a line", field="text")
    return texts
