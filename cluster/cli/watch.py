"""Keep a view of the cluster on the terminal: ask the coordinator every second, and draw what it says.

While the coordinator does not answer, the last view stays below a line that says so.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from cluster.cli.json_output import print_json
from cluster.cli.keyboard import Key, listen
from cluster.cli.screen import console, format_duration
from cluster.client import AsyncClient, ClusterState
from cluster.core.errors import DeadlineExceeded, MacpipeError, Unreachable

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERVAL_S: Final = 1.0
ANSWER_S: Final = 5.0
"""A coordinator that answers later counts as lost; the next question may find it again."""


class View(Protocol):
    """What is drawn of the snapshots of a cluster."""

    def add(self, state: ClusterState) -> None:
        """Show this snapshot from now on."""

    def press(self, key: Key) -> None:
        """Handle a key other than ``QUIT``."""

    def draw(self, width: int, height: int, lost: str) -> RenderableType:
        """Return the screen; ``lost`` says why the snapshot is old, "" if it is not."""


def watch_cluster(coordinator: str | None, cluster: str | None, view: View) -> None:
    """Show ``view`` on the terminal until q is pressed.

    Raises MacpipeError if the first question fails; later, unless the coordinator just does not answer.
    """
    asyncio.run(_watch(coordinator, cluster, view))


async def _watch(coordinator: str | None, cluster: str | None, view: View) -> None:
    from rich.live import Live

    screen = console(sys.stdout)
    changed, ended = asyncio.Event(), asyncio.Event()

    def press(key: Key) -> None:
        if key is Key.QUIT:
            ended.set()
        else:
            view.press(key)
        changed.set()

    async with AsyncClient(coordinator, cluster=cluster, timeout_s=ANSWER_S) as client:
        view.add(await client.cluster())
        questions = _Questions(client, view, changed)
        with Live(console=screen, screen=True, auto_refresh=False) as live, listen(press), _resizes(changed):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(questions.ask)
                while not ended.is_set() and not questions.error:
                    changed.clear()
                    live.update(view.draw(screen.width, screen.height, questions.lost), refresh=True)
                    await changed.wait()
                tasks.cancel_scope.cancel()
    if questions.error:
        raise questions.error


class _Questions:
    """Asks for a snapshot every ``INTERVAL_S``. ``error`` is set if asking again is of no use."""

    def __init__(self, client: AsyncClient, view: View, changed: asyncio.Event) -> None:
        self._client, self._view, self._changed = client, view, changed
        self._lost_at: float | None = None
        self._why = ""
        self.error: MacpipeError | None = None

    @property
    def lost(self) -> str:
        """For how long the coordinator has not answered, in a sentence; "" if it does."""
        if self._lost_at is None:
            return ""
        since = format_duration(time.monotonic() - self._lost_at)
        return f"no answer from the coordinator at {self._client.address} for {since}; asking again ({self._why})"

    async def ask(self) -> None:
        """Ask until cancelled, or until ``error`` is set."""
        while not self.error:
            await asyncio.sleep(INTERVAL_S)
            try:
                self._view.add(await self._client.cluster())
                self._lost_at = None
            except (Unreachable, DeadlineExceeded) as e:
                self._lost_at = time.monotonic() if self._lost_at is None else self._lost_at
                self._why = e.sentence
            except MacpipeError as e:
                self.error = e
            self._changed.set()


@contextmanager
def _resizes(changed: asyncio.Event) -> Iterator[None]:
    """Set ``changed`` when the terminal's size changes."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def print_states(coordinator: str | None, cluster: str | None) -> None:
    """Print the state as a JSON object every second, until interrupted. Raises MacpipeError if an answer fails."""
    asyncio.run(_print_each_second(coordinator, cluster))


async def _print_each_second(coordinator: str | None, cluster: str | None) -> None:
    async with AsyncClient(coordinator, cluster=cluster, timeout_s=ANSWER_S) as client:
        while True:
            print_json(await client.cluster())
            sys.stdout.flush()
            await asyncio.sleep(INTERVAL_S)
