"""Admits Macs while a command runs in the foreground, and reports each Mac that joined."""

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
"""Interval for polling the tokens' state: another process may be the one that admits."""

JoinHost = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="ADDRESS",
        help="Admit Macs on this address.",
        show_default="all addresses; VPN addresses are not announced",
    ),
]
JoinPort = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, metavar="PORT", help="Admit Macs on this port; 0 picks a free one.", show_default="7701"
    ),
]


def admit(folder: ClusterFolder, tokens: Sequence[JoinToken], host: str, port: int | None) -> int:
    """Admit Macs until every token is used, revoked or expired, or until Ctrl-C.

    Return the exit code: 1 if a token was revoked or expired without being used.
    """
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

    watch = _JoinWatch(TokenStore(folder), ids)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(stop_on_signal, tasks.cancel_scope)
        where = await _start_admitting(stack, folder, host, port)
        note(f"waiting for {_macs(len(ids))} {where}; Ctrl-C stops waiting, and `macpipe serve` admits them too")
        while not watch.is_over():
            for line in watch.check():
                note(line)
            await anyio.sleep(0 if watch.is_over() else LOOK_S)
        tasks.cancel_scope.cancel()
    if watch.is_over():
        return watch.exit_code
    sys.stderr.write("\r")  # overwrite the terminal's ^C
    note(f"stopped waiting; {_macs(len(watch.open))} may still join while `macpipe serve` runs")
    return 0


async def _start_admitting(stack: AsyncExitStack, folder: ClusterFolder, host: str, port: int | None) -> str:
    """Open the join port unless this cluster's running coordinator has it. Return in words where Macs are admitted."""
    from cluster.core.errors import PortInUse
    from cluster.joining.join_port import EVERYWHERE, admit_macs
    from cluster.security.limits import DEFAULT_JOIN_PORT

    try:
        wanted = DEFAULT_JOIN_PORT if port is None else port
        address = await stack.enter_async_context(admit_macs(folder, host or EVERYWHERE, wanted))
    except PortInUse:
        if port is None and await _coordinator_admits(folder, DEFAULT_JOIN_PORT):
            return "at this Mac's running coordinator"
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
    """Tokens that are still open. ``exit_code`` is 1 if a token was revoked or expired without being used."""

    def __init__(self, tokens: TokenStore, ids: list[str]) -> None:
        self._tokens = tokens
        self.open = set(ids)
        self.exit_code = 0

    def is_over(self) -> bool:
        """Return whether every token was used, revoked or expired."""
        return not self.open

    def check(self) -> list[str]:
        """Return a line for each token that was used, revoked or expired since the last call."""
        import time

        from cluster.security.tokens import TokenState

        lines = []
        for token in self._tokens.all_tokens():
            state = token.state(time.time())
            if token.id not in self.open or state is TokenState.OPEN:
                continue
            self.open.discard(token.id)
            if state is TokenState.USED:
                lines.append(f"{token.user} joined as {token.role}")
            else:
                self.exit_code = 1
                lines.append(f"a token for a {token.role} ({token.id}) is {state} and was not used")
        return lines


def _macs(count: int) -> str:
    return "one Mac" if count == 1 else f"{count} Macs"
