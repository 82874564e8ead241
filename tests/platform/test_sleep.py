from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import anyio
import pytest

from cluster.platform.sleep import caffeinate_command, stay_awake

SLEEPER = """#!/bin/sh
echo "$$" >> "$0.pids"
exec sleep 60
"""


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A stand-in for caffeinate that writes its process id into ``command.pids``."""
    path = tmp_path / "command"
    path.write_text(SLEEPER)
    path.chmod(0o755)
    return path


def started(command: Path) -> list[int]:
    pids = Path(f"{command}.pids")
    return [int(line) for line in pids.read_text().splitlines()] if pids.exists() else []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_mac_stays_awake_only_while_there_is_work(command: Path, anyio_backend: str) -> None:
    busy = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stay_awake, lambda: busy, (str(command),), 0.01, 0.02)
        for turn in (1, 2):
            assert len(started(command)) == turn - 1
            busy = True
            while len(started(command)) < turn:
                await anyio.sleep(0.01)
            assert is_alive(started(command)[-1])
            busy = False
            while is_alive(started(command)[-1]):
                await anyio.sleep(0.01)
        busy = True
        while len(started(command)) < 3:
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert not any(is_alive(pid) for pid in started(command)), "none outlives the daemon"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_missing_command_is_logged_once(caplog: pytest.LogCaptureFixture, anyio_backend: str) -> None:
    await stay_awake(lambda: True, ("macpipe-no-such-program",))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "this Mac may sleep while it works" in caplog.text


def test_only_idle_sleep_is_prevented_and_only_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """caffeinate(8): -i prevents idle sleep, -w ends with a process. -d would keep the display on."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert caffeinate_command() == ("caffeinate", "-i", "-w", str(os.getpid()))
    monkeypatch.setattr(sys, "platform", "linux")
    assert caffeinate_command() == ()
    assert shutil.which("caffeinate") is None or sys.platform == "darwin"
