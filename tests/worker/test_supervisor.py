"""The engine's process: its command line, and the handling of invalid messages."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from cluster.core.errors import BadFrame, WorkerLost
from cluster.core.limits import OVERLOADED_S
from cluster.core.plan import Profile
from cluster.worker.engine_launcher import EngineLauncher, engine_command
from cluster.worker.pipe_messages import Done, Hello, Load, Measured, Reported, pack, read, unpacker
from cluster.worker.settings import WorkerSettings
from cluster.worker.supervisor import Supervisor

EVIL = "open({!r}, 'w').close()\nraise SystemExit(3)\n"


def test_an_engine_imports_nothing_from_where_the_daemon_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "msgpack.py").write_text(EVIL.format(str(tmp_path / "it-ran")))
    monkeypatch.chdir(tmp_path)

    async def body() -> None:
        supervisor = Supervisor(EngineLauncher(engine_command(WorkerSettings("eve", tmp_path, host="127.0.0.1"), None)))
        running = asyncio.create_task(supervisor.run())
        await asyncio.wait([running, asyncio.create_task(supervisor.wait_started())], return_when="FIRST_COMPLETED")
        assert supervisor.hello, supervisor.problem
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(body())
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("said", [b"\xc1", b"\x05", b"\x92\xa4Done\xa11", b"\xda\xff\xff" + b"x" * 70_000])
def test_an_engine_that_says_nonsense_is_killed(said: bytes, tmp_path: Path) -> None:
    async def body() -> None:
        program = f"import sys, time; sys.stdout.buffer.write({said!r}); sys.stdout.flush(); time.sleep(60)"
        supervisor = Supervisor(EngineLauncher([sys.executable, "-c", program]))
        with pytest.raises(WorkerLost, match=r"the engine was killed: .*message"):
            await supervisor.run()

    asyncio.run(body())


def test_a_start_that_takes_long_is_waited_for_while_it_gets_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.worker.supervisor.ENGINE_START_TIMEOUT_S", 0.8)
    hello = pack(Hello(1, "", "", "", "", 1, 1))
    busy = "import sys, time; end = time.monotonic() + 1.0\nwhile time.monotonic() < end: pass\n"
    slow = f"{busy}sys.stdout.buffer.write({hello!r}); sys.stdout.flush(); time.sleep(60)"

    async def start(program: str) -> None:
        supervisor = Supervisor(EngineLauncher([sys.executable, "-c", program]))
        running = asyncio.create_task(supervisor.run())
        try:
            await supervisor.wait_started()
        finally:
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(start(slow))
    with pytest.raises(WorkerLost, match="did not start within 1 s"):
        asyncio.run(start("import time; time.sleep(60)"))


def test_an_engine_that_does_not_stop_computing_for_an_earlier_term_is_killed_before_anybody_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.worker.supervisor.FENCE_S", 0.1)
    hello = pack(Hello(1, "", "", "", "", 1, 1))
    program = f"import sys; sys.stdout.buffer.write({hello!r}); sys.stdout.flush()\nwhile True: pass"

    async def body() -> None:
        supervisor = Supervisor(EngineLauncher([sys.executable, "-c", program]))
        await supervisor.fence()  # there is no engine yet
        running = asyncio.create_task(supervisor.run())
        await supervisor.wait_started()
        process = supervisor._process
        assert process
        await supervisor.fence()
        assert process.returncode == -signal.SIGKILL
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(body())


async def reports_until_refused(supervisor: Supervisor) -> None:
    while True:
        await supervisor.report()


def test_an_engine_that_computes_is_slow_and_one_that_is_stopped_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither answers. The difference is the processor time that they get."""
    for name, seconds in {"REPORT_TIMEOUT_S": 0.6, "HEARTBEAT_S": 0.05, "ENGINE_SILENCE_S": 1.2}.items():
        monkeypatch.setattr(f"cluster.worker.supervisor.{name}", seconds)
    hello = pack(Hello(1, "", "", "", "", 1, 1))
    program = f"import sys; sys.stdout.buffer.write({hello!r}); sys.stdout.flush()\nwhile True: pass"

    async def body() -> None:
        supervisor = Supervisor(EngineLauncher([sys.executable, "-c", program]))
        running = asyncio.create_task(supervisor.run())
        await supervisor.wait_started()
        assert await supervisor.report() == Reported(0, 0, 0), "of one that is slow: what it said last"
        process = supervisor._process
        assert process
        process.send_signal(signal.SIGSTOP)
        assert await process.wait() == -signal.SIGKILL
        while "the engine hung" not in caplog.text:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(body())


def test_an_engine_that_cannot_answer_delays_no_heartbeat_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it meets the other ranks of its group; afterwards it has to answer again."""
    for name, seconds in {"REPORT_TIMEOUT_S": 0.2, "HEARTBEAT_S": 0.02, "ENGINE_SILENCE_S": 0.4}.items():
        monkeypatch.setattr(f"cluster.worker.supervisor.{name}", seconds)
    hello = pack(Hello(1, "", "", "", "", 1, 1))
    program = f"import sys; sys.stdout.buffer.write({hello!r}); sys.stdout.flush(); sys.stdin.read()"

    async def body() -> None:
        supervisor = Supervisor(EngineLauncher([sys.executable, "-S", "-c", program]), number=1)
        running = asyncio.create_task(supervisor.run_once())
        await supervisor.wait_started()
        with supervisor.silence():
            assert await supervisor.report() == Reported(0, 0, 0)
            await asyncio.sleep(1.0)
            assert not running.done()
            assert await supervisor.report() == Reported(0, 0, 0)
        with pytest.raises(WorkerLost, match="has not answered"):
            await reports_until_refused(supervisor)
        await running
        assert "hung" in supervisor.problem

    asyncio.run(body())


@pytest.mark.parametrize("number", [0, 1])
def test_a_standby_that_hangs_is_replaced_when_it_is_needed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the daemon's first engine, which was killed, and for a further one that a slice is to be loaded into."""
    monkeypatch.setattr("cluster.worker.supervisor.ENGINE_START_SILENCE_S", 0.4)
    monkeypatch.setattr("cluster.worker.engine_launcher.STANDBY_AFTER_S", 0.01)
    hello = pack(Hello(1, "", "", "", "", 1, 1))
    begin = "import sys, time; sys.stdin.buffer.read(1)\n"
    program = f"{begin}sys.stdout.buffer.write({hello!r}); sys.stdout.flush(); sys.stdin.read()"

    async def body() -> None:
        launcher = EngineLauncher([sys.executable, "-S", "-c", program])
        first, further = Supervisor(launcher), Supervisor(launcher, number=1)
        tasks = [asyncio.create_task(first.run())]
        await first.wait_started()
        keeping = asyncio.create_task(launcher.keep())
        while not launcher.ready:
            await asyncio.sleep(0.01)
        standby = launcher._waiting
        assert standby
        standby.send_signal(signal.SIGSTOP)
        if number:
            tasks.append(asyncio.create_task(further.run_once()))
            await further.wait_started()
        else:
            first.reset("it is to take the standby")
            while first.hello:
                await asyncio.sleep(0.01)
            while not first.hello:
                await asyncio.sleep(0.01)
        assert standby.returncode == -signal.SIGKILL
        taken = (first, further)[number]._process
        assert taken
        assert (taken.pid != standby.pid, taken.returncode) == (True, None)
        for task in (keeping, *tasks):
            task.cancel()
        await asyncio.wait([keeping, *tasks])

    asyncio.run(body())


def test_a_further_engine_that_hangs_twice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.worker.supervisor.ENGINE_START_SILENCE_S", 0.4)

    async def body() -> None:
        supervisor = Supervisor(EngineLauncher([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]), number=1)
        running = asyncio.create_task(supervisor.run_once())
        with pytest.raises(WorkerLost, match=r"hung for .* before it was ready"):
            await supervisor.wait_started()
        await running

    asyncio.run(body())


def test_an_engine_is_excused_while_this_machine_is_overloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.worker.supervisor.REPORT_TIMEOUT_S", 0.1)
    hello, lag = pack(Hello(1, "", "", "", "", 1, 1)), [OVERLOADED_S]
    program = f"import sys, time; sys.stdout.buffer.write({hello!r}); sys.stdout.flush(); time.sleep(60)"

    async def body() -> None:
        supervisor = Supervisor(EngineLauncher([sys.executable, "-c", program]), lambda: lag[0])
        running = asyncio.create_task(supervisor.run())
        await supervisor.wait_started()
        assert await supervisor.report() == Reported(0, 0, 0)
        lag[0] = 0.0
        with pytest.raises(WorkerLost, match="has not answered"):
            await reports_until_refused(supervisor)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(body())


def test_messages_come_whole_from_pieces() -> None:
    said = [Load(1, 7, 0, 2, "m", "/m", "ab", 0, 4, 64), Done(1)]
    data, stream = b"".join(map(pack, said)), unpacker()
    assert [m for at in range(len(data)) for m in read(stream, data[at : at + 1])] == said


def test_a_message_without_an_end_is_bounded() -> None:
    stream = unpacker()
    endless = [b"\xdb\xff\xff\xff\xff", *(bytes(65_000) for _ in range(40))]
    with pytest.raises(BadFrame):
        deque(chain.from_iterable(read(stream, data) for data in endless), 0)


@pytest.mark.parametrize("costs", [(), ((2, 1.25),), ((3, 1.11), (8, 2.2))])
def test_an_engine_tells_the_profile_that_it_measured(costs: tuple[tuple[int, float], ...]) -> None:
    profile = Profile(1e11, 1e-5, 1e-4, 1e12, 0.1, verify_costs=costs)
    (measured,) = read(unpacker(), pack(Measured.of(1, profile, disturbed="")))
    assert isinstance(measured, Measured)
    assert measured.profile == profile
    damaged = replace(measured, verify_costs=(float("nan"), 1.0))
    assert damaged.profile == replace(profile, verify_costs=())
