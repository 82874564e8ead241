"""Waiting for Macs: the join port while a command stays in the foreground, and word of everyone who came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from cluster.security.cluster_folder import ClusterFolder
    from cluster.security.tokens import JoinToken, TokenStore

LOOK_S: Final = 0.5
"""How often it is looked whether a token was used: the port that admits may be another process's."""

Cluster = Annotated[str, typer.Option(metavar="NAME", envvar="MACPIPE_CLUSTER", help="The cluster's name on this Mac.")]
JoinHost = Annotated[
    str, typer.Option("--host", help="Admit Macs on this address.", show_default="all, but no VPN is announced")
]
JoinPort = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Admit Macs on this port; 0 takes a free one.", show_default="7701"),
]


def admit(folder: ClusterFolder, tokens: Sequence[JoinToken], host: str, port: int | None) -> int:
    """Admit Macs until each of ``tokens`` was used or ended, or Ctrl-C; the exit code: 0 unless one ended unused."""
    import anyio

    from cluster.core.errors import MacpipeError
    from cluster.platform.process import accept_signals, first_error

    accept_signals()
    code = 1
    try:
        code = anyio.run(_admit, folder, [token.id for token in tokens], host, port)
    except* MacpipeError as group:
        raise first_error(group) from None
    return code


async def _admit(folder: ClusterFolder, ids: list[str], host: str, port: int | None) -> int:
    import anyio

    from cluster.cli.screen import note
    from cluster.platform.process import stop_on_signal
    from cluster.security.tokens import TokenStore

    waiting = _JoinWatch(TokenStore(folder), ids)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(stop_on_signal, tasks.cancel_scope)
        where = await _open(stack, folder, host, port)
        note(f"waiting for {_macs(len(ids))} {where}; Ctrl-C ends this, and `macpipe serve` admits them as well")
        while not waiting.over():
            for word in waiting.news():
                note(word)
            await anyio.sleep(0 if waiting.over() else LOOK_S)
        tasks.cancel_scope.cancel()
    if waiting.over():
        return waiting.unused
    sys.stderr.write("\r")  # over the terminal's ^C
    note(f"nobody is waited for any more; {_macs(len(waiting.open))} may still join while `macpipe serve` runs")
    return 0


async def _open(stack: AsyncExitStack, folder: ClusterFolder, host: str, port: int | None) -> str:
    """Where Macs are admitted: on a port of this process, or on that of a coordinator of this cluster that runs."""
    from cluster.core.errors import PortInUse
    from cluster.joining.join_port import EVERYWHERE, admit_macs
    from cluster.security.bounds import DEFAULT_JOIN_PORT

    try:
        wanted = DEFAULT_JOIN_PORT if port is None else port
        address = await stack.enter_async_context(admit_macs(folder, host or EVERYWHERE, wanted))
    except PortInUse:
        if port is None and await _coordinator_admits(folder, DEFAULT_JOIN_PORT):
            return "at the coordinator that runs here"
        raise
    return f"on port {address.rpartition(':')[2]}"


async def _coordinator_admits(folder: ClusterFolder, port: int) -> bool:
    from cluster.core.errors import MacpipeError
    from cluster.joining.client import fetch_authority

    try:
        shown = await fetch_authority(f"127.0.0.1:{port}")
    except MacpipeError:
        return False
    return shown.authority.certificate == folder.authority.read_bytes()


class _JoinWatch:
    """Which tokens are open still; exit code ``unused`` is 1 where one ended without a Mac."""

    def __init__(self, tokens: TokenStore, ids: list[str]) -> None:
        self._tokens = tokens
        self.open = set(ids)
        self.unused = 0

    def over(self) -> bool:
        return not self.open

    def news(self) -> list[str]:
        """A line for each token that was used or ended since the last look."""
        import time

        from cluster.security.tokens import TokenState

        said = []
        for token in self._tokens.all_tokens():
            state = token.state(time.time())
            if token.id not in self.open or state is TokenState.OPEN:
                continue
            self.open.discard(token.id)
            if state is TokenState.USED:
                said.append(f"{token.user} joined as {token.role}")
            else:
                self.unused = 1
                said.append(f"a token for a {token.role} ({token.id}) is {state} and was not used")
        return said


def _macs(count: int) -> str:
    return "one Mac" if count == 1 else f"{count} Macs"
