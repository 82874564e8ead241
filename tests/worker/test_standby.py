"""The standby: who asks for an engine gets the one in waiting, and never one that has died."""

from __future__ import annotations

import asyncio
import sys

import pytest

from cluster.worker import standby
from cluster.worker.standby import Standby

COMMAND = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]


async def until_ready(kept: Standby) -> None:
    async with asyncio.timeout(10):
        while not kept.ready:
            await asyncio.sleep(0.01)


def test_the_one_in_waiting_is_taken_and_the_next_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "STANDBY_AFTER_S", 0.05)

    async def scenario() -> None:
        kept = Standby(COMMAND)
        first = await kept.take()
        keeping = asyncio.create_task(kept.keep())
        await until_ready(kept)
        second = await kept.take()
        assert (second.pid != first.pid, kept.ready) == (True, False)
        await until_ready(kept)
        dead = kept._waiting
        assert dead
        dead.kill()
        await dead.wait()
        assert not kept.ready
        third = await kept.take()
        assert third.pid != dead.pid
        await until_ready(kept)
        last = kept._waiting
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        assert last
        assert last.returncode is not None
        for process in (first, second, third):
            assert process.returncode is None
            process.stdin.close()  # type: ignore[union-attr]
            assert await process.wait() == 0

    asyncio.run(scenario())
