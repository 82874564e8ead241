"""The standby: whoever needs an engine gets the waiting one, and never a dead one."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from typing import Any

import anyio
import pytest

from cluster.core.errors import WorkerLost
from cluster.worker import engine_launcher as standby
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.supervisor import Supervisor

COMMAND = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]


async def until_ready(kept: EngineLauncher) -> None:
    async with asyncio.timeout(10):
        while not kept.ready:
            await asyncio.sleep(0.01)


def test_the_one_in_waiting_is_taken_and_the_next_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "STANDBY_AFTER_S", 0.05)

    async def scenario() -> None:
        kept = EngineLauncher(COMMAND)
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


class Launches:
    """Stands before the system's own launching of processes, which fails ``failures`` times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.tried, self._launch = failures, 0, asyncio.create_subprocess_exec

    async def __call__(self, *command: str, **options: Any) -> asyncio.subprocess.Process:
        self.tried += 1
        if self.tried <= self.failures:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await self._launch(*command, **options)


@pytest.mark.parametrize("of", [EngineLauncher.keep, lambda kept: Supervisor(kept).run_once()])
def test_an_engine_whose_start_is_cancelled_is_ended(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "STANDBY_AFTER_S", 0.01)
    started = list[asyncio.subprocess.Process]()
    launch = asyncio.create_subprocess_exec

    async def scenario() -> None:
        with anyio.CancelScope() as scope:

            async def cancel_meanwhile(*command: str, **options: Any) -> asyncio.subprocess.Process:
                asyncio.get_running_loop().call_soon(scope.cancel)
                started.append(await launch(*command, **options))
                return started[-1]

            monkeypatch.setattr(asyncio, "create_subprocess_exec", cancel_meanwhile)
            await of(EngineLauncher(COMMAND))

    asyncio.run(scenario())
    (engine,) = started
    assert engine.returncode is not None


def test_a_standby_that_the_system_does_not_start_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "STANDBY_AFTER_S", 0.01)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", launches := Launches(3))

    async def scenario() -> None:
        kept = EngineLauncher(COMMAND)
        keeping = asyncio.create_task(kept.keep())
        await until_ready(kept)
        assert launches.tried == 4
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping

    asyncio.run(scenario())


def test_a_first_engine_that_the_system_does_not_start_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "create_subprocess_exec", Launches(1))
    with pytest.raises(WorkerLost, match="cannot start the engine process: Too many open files"):
        asyncio.run(Supervisor(EngineLauncher(COMMAND)).run())


@pytest.mark.parametrize("own", [None, "1"])
def test_no_number_of_lengths_ends_an_engine(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's CUDA backend raises an error at the 512th length, unless told otherwise; a user may ask for that."""
    check = "MLX_ENABLE_CACHE_THRASHING_CHECK"
    monkeypatch.delenv(check, raising=False)
    if own:
        monkeypatch.setenv(check, own)

    async def scenario() -> bytes:
        command = [sys.executable, "-S", "-c", f"import os; print(os.environ['{check}'], end='')"]
        process = await EngineLauncher(command).take()
        said, _ = await process.communicate()
        return said

    assert asyncio.run(scenario()) == (own or "0").encode()


LOADS = """
import threading

MIB = 2**20


def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def load():
    parts = [bytes([1]) * 65536 for _ in range(128)]
    kept.append(parts[-1])  # lies behind what is freed, so that the heap cannot shrink
    del parts
    ready.set()
    ended.wait()


kept, ended, before = [], threading.Event(), anonymous()
for _ in range(16):
    ready = threading.Event()
    threading.Thread(target=load, daemon=True).start()
    ready.wait()
print((anonymous() - before) // MIB)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_threads_that_load_in_turn_share_the_memory_that_one_of_them_freed() -> None:
    """Each of 16 threads, all alive, needs 8 MiB for a moment and keeps a little of it."""

    async def scenario() -> int:
        process = await EngineLauncher([sys.executable, "-S", "-c", LOADS]).take()
        said, _ = await process.communicate()
        return int(said)

    assert asyncio.run(scenario()) < 3 * 8
