"""Errors of futures that nobody awaits any more."""

from __future__ import annotations

import asyncio
import gc

from cluster.core.futures import ignore_error


def test_an_ignored_error_is_not_logged_and_another_one_is() -> None:
    reported: list[str] = []

    async def fail(what: str) -> None:
        raise ValueError(what)

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        ignored, missed = asyncio.create_task(fail("ignored")), asyncio.create_task(fail("missed"))
        cancelled = asyncio.create_task(asyncio.sleep(9))
        for task in (ignored, cancelled):
            task.add_done_callback(ignore_error)
        cancelled.cancel()
        await asyncio.wait((ignored, missed, cancelled))
        del ignored, missed, cancelled, task
        gc.collect()

    asyncio.run(body())
    assert reported == ["missed"]
