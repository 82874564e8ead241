"""Large requests are parsed in one thread, small ones on the event loop; and who cannot wait is told when to return."""

from __future__ import annotations

import threading

import anyio
import pytest

from cluster.core.errors import Busy
from cluster.core.limits import RETRY_AFTER_S, SMALL_REQUEST_BYTES
from cluster.transport.parsing_thread import ParsingThread

pytestmark = pytest.mark.anyio


async def test_small_work_runs_on_the_loop_and_large_work_in_a_thread() -> None:
    thread = ParsingThread()
    here = threading.get_ident()
    assert await thread.run(SMALL_REQUEST_BYTES, threading.get_ident) == here
    assert await thread.run(SMALL_REQUEST_BYTES + 1, threading.get_ident) != here


async def test_one_piece_runs_at_a_time_and_more_than_may_wait_are_refused() -> None:
    thread = ParsingThread(waiting=2)
    go_on = threading.Event()
    at_once: list[int] = []
    running: list[int] = []
    refused: list[Busy] = []

    def work() -> None:
        running.append(1)
        at_once.append(len(running))
        assert go_on.wait(10)
        running.pop()

    async def ask() -> None:
        try:
            await thread.run(SMALL_REQUEST_BYTES + 1, work)
        except Busy as error:
            refused.append(error)
            go_on.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(ask)
    assert at_once == [1, 1, 1]
    assert [error.retry_after_s for error in refused] == [RETRY_AFTER_S]
