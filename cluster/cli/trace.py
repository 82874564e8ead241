"""``macpipe trace``: writes an answer's way through the stages as a file for Perfetto."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import Cluster, Coordinator
from cluster.core.errors import InvalidOption

STDOUT = "-"


def trace(
    request: Annotated[
        str, typer.Argument(metavar="[REQUEST]", help="The id of a request.", show_default="your newest one")
    ] = "",
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The file to write; - is stdout.")
    ] = "trace.json",
    coordinator: Coordinator = None,
    cluster: Cluster = None,
) -> None:
    """Write an answer's way through the stages as Chrome trace events.

    Open the file at ui.perfetto.dev or in chrome://tracing. The coordinator remembers the last frames of the loaded
    model, some minutes of them.
    """
    from cluster.cli.screen import note
    from cluster.client import Client
    from cluster.codec.chrome_trace import to_chrome_trace

    with Client(coordinator, cluster=cluster) as client:
        found = client.trace(request)
    text = json_text.dumps(to_chrome_trace(found), separators=(",", ":"))
    if output == STDOUT:
        sys.stdout.write(f"{text}\n")
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as e:
        raise InvalidOption(f"--output {output} cannot be written: {e.strerror or e}", field="output") from None
    own = sum(frame.own for frame in found.frames)
    cut = "" if found.complete else "; its first frames are forgotten"
    note(f"wrote {output}: {own} frames of request {found.request_id}{cut}; open it at ui.perfetto.dev")
