"""The lock that a worker's engines hold for longer than their daemon."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from cluster.core.errors import InvalidOption
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.engine_lock import EngineLock


def test_engines_of_an_earlier_daemon_hold_the_lock_until_they_end(tmp_path: Path) -> None:
    async def body() -> None:
        with EngineLock.open(tmp_path) as first:
            assert first.acquire()
            launcher = EngineLauncher([sys.executable, "-c", "input()"], (first.file,))
            engine = await launcher.take()
        with EngineLock.open(tmp_path) as second:
            own = await EngineLauncher([sys.executable, "-c", "input()"], (second.file,)).take()
            assert not second.acquire(), "the daemon is gone, its engine is not"
            engine.kill()
            await engine.wait()
            assert second.acquire()
            assert second.acquire()
            own.kill()
            await own.wait()
            assert second.acquire()
        for process in (engine, own):
            process._transport.close()  # type: ignore[attr-defined]

    asyncio.run(body())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "engines.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidOption, match=r"engines\.lock"), EngineLock.open(tmp_path):
        raise AssertionError("it is open")
