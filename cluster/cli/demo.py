"""``macpipe demo``: runs a whole cluster on this machine, with the bundled model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.cli.chat import BUNDLED, converse
from cluster.core.cluster_state import holders_in_words
from cluster.core.limits import CANARY_TIMEOUT_S, CONNECT_TIMEOUT_S, DISCOVERY_TIMEOUT_S, ENGINE_START_TIMEOUT_S

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.cli.process_group import ProcessGroup
    from cluster.client import Client, ClusterState

HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = ENGINE_START_TIMEOUT_S + DISCOVERY_TIMEOUT_S + CANARY_TIMEOUT_S
"""Sum of the timeouts of the steps: engines start, workers are discovered, a first token passes."""


def demo(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Send this prompt, print the answer, and exit.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="A Hugging Face id or a folder.", show_default="the small bundled model"),
    ] = BUNDLED,
    workers: Annotated[
        int, typer.Option(min=1, max=8, metavar="N", help="Number of workers; the bundled model has 8 layers.")
    ] = 2,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Maximum length of the answer, in tokens.")
    ] = None,
) -> None:
    """Try a whole cluster on this machine.

    Starts workers and a coordinator, loads a model, and opens a chat with it. Stops and deletes everything at the end.
    """
    import signal
    import tempfile
    from pathlib import Path

    from cluster.cli.process_group import ProcessGroup, SignalExit, reserve_port
    from cluster.cli.screen import note
    from cluster.platform.process import accept_signals

    accept_signals()
    # On a terminal, Ctrl-C ends an answer and not the chat.
    has_chat = prompt is None and sys.stdin.isatty()
    exits = [signal.SIGTERM, signal.SIGHUP, *([] if has_chat else [signal.SIGINT])]
    with (
        SignalExit(*exits) as signal_exit,
        reserve_port(HOST) as port,
        tempfile.TemporaryDirectory(prefix="macpipe-demo-") as folder,
        ProcessGroup(Path(folder)) as processes,
        signal_exit.insisting(),
    ):
        address = f"{HOST}:{port}"
        note(f"starting {workers} worker{'s' * (workers != 1)} and a coordinator on this machine ...")
        cluster = start(processes, Path(folder), workers, address, model)
        chat_with(processes, address, cluster, prompt, max_tokens)


def chat_with(processes: ProcessGroup, address: str, cluster: str, prompt: str | None, max_tokens: int | None) -> None:
    """Wait until the coordinator serves, then send the prompt or open a chat."""
    # gRPC is not fork-safe: import it only after all processes were started.
    from cluster.client import Client

    with Client(address, cluster=cluster) as client:
        state = wait_until_serving(processes, client)
        if prompt is None:
            open_chat(client, cluster, max_tokens)
        else:
            print_answer(client, state, prompt, max_tokens)


def start(processes: ProcessGroup, folder: Path, workers: int, address: str, model: str) -> str:
    """Start all processes and return their cluster's name. The coordinator discovers workers by mDNS on loopback."""
    import secrets

    cluster = f"demo-{secrets.token_hex(4)}"
    for number in range(1, workers + 1):
        name = f"demo-{number}"
        own = ["--name", name, "--host", HOST, "--home", str(folder / name), "--profile", "off", "--no-standby"]
        processes.start(f"worker {name}", ["worker", "--cluster", cluster, *own])
    port = address.rpartition(":")[2]
    own = ["--workers", str(workers), "--host", HOST, "--port", port, "--wait", str(ENGINE_START_TIMEOUT_S)]
    own += ["--home", str(folder / "coordinator")]
    processes.start("coordinator", ["serve", model, "--cluster", cluster, *own])
    return cluster


def wait_until_serving(processes: ProcessGroup, client: Client) -> ClusterState:
    """Wait until the coordinator serves. Raise MacpipeError if a process ends, loading fails, or time is up.

    The time to load is not limited here: a model of the user's choice may be large.
    """
    import time

    from cluster.cli.process_group import POLL_S
    from cluster.core.errors import DeadlineExceeded, MacpipeError

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        processes.check()
        if is_listening(client.address):
            state = client.cluster()
            if state.state == "serving":
                return state
            if state.state == "failed":
                raise MacpipeError(state.problem)
            if state.state == "loading":  # a load that stops is the coordinator's matter
                deadline = time.monotonic() + START_TIMEOUT_S
        time.sleep(POLL_S)
    raise DeadlineExceeded(f"the coordinator did not start serving within {START_TIMEOUT_S:.0f} s")


def is_listening(address: str) -> bool:
    """Return whether ``address`` accepts TCP connections."""
    import socket

    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def open_chat(client: Client, cluster: str, max_tokens: int | None) -> None:
    """Print how to send requests from another terminal, and open the chat."""
    from cluster.cli.command_name import command_name
    from cluster.cli.screen import note

    variables = f"MACPIPE_COORDINATOR={client.address} MACPIPE_CLUSTER={cluster}"
    note(f"from another terminal: {variables} {command_name()} generate -p 'Who are you?'")
    converse(client, {"max_tokens": max_tokens})


def print_answer(client: Client, state: ClusterState, prompt: str, max_tokens: int | None) -> None:
    """Print the answer on stdout, and the stages that computed it on stderr."""
    from cluster.cli.answer_summary import summarize_answer
    from cluster.cli.generate import print_stream
    from cluster.cli.screen import note

    note(f"serving {state.model}: {holders_in_words(state.stages, ' layers ')}")
    with client.stream_chat([("user", prompt)], max_tokens=max_tokens) as stream:
        print_stream(stream, client, tell_accepted=lambda _: None)
        if stream.finish and sys.stderr.isatty():
            note(summarize_answer(stream.finish))
