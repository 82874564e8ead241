"""A worker examines its Mac in a process of its own, over the port on which its coordinator asks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from cluster.codec.examination import decode_results
from cluster.core.errors import Busy, MacpipeError
from cluster.sandbox import child_process
from cluster.sandbox.child_streams import start_child
from cluster.v1 import worker_pb2 as pb
from cluster.worker import examiner
from cluster.worker.examination_child import NICENESS
from cluster.worker.examiner import Examiner

REQUEST = pb.ExamineRequest(members=[pb.MemberAddress(name="mac-2", address="0.0.0.0:1"), pb.MemberAddress()])


class Children:
    """Starts ``module`` in place of the examination, and keeps the processes."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.started: list[Popen[bytes]] = []

    def __call__(self, module: str, environment: dict[str, str], stderr: int | None) -> Any:
        child, ours = start_child(self.module or module, environment, stderr)
        self.started.append(child)
        return child, ours


@pytest.mark.timeout(300)  # at low priority, on a machine that runs other tests
@pytest.mark.anyio
async def test_a_process_of_low_priority_examines_the_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children("")
    monkeypatch.setattr(child_process, "start_child", children)
    monkeypatch.setattr(examiner, "EXAMINE_S", 280.0)
    priorities = []
    exchange = examiner._exchange

    async def watch(*given: Any) -> pb.ExamineResponse:
        answer = await exchange(*given)
        priorities.append(os.getpriority(os.PRIO_PROCESS, children.started[0].pid))
        return answer

    monkeypatch.setattr(examiner, "_exchange", watch)
    answer = await Examiner(tmp_path).examine(REQUEST)
    found = {one.check: one.findings for one in decode_results(answer.results, "mac-1")}
    assert {"MLX", "disk", "certificates"} <= found.keys()
    (refused,) = found["connections to members"] or ()
    assert refused.what == "no connection to mac-2 at 0.0.0.0:1: refused"
    assert priorities == [min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)]
    assert [child.returncode is not None for child in children.started] == [True]


@pytest.mark.anyio
async def test_an_examination_that_fails_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children("this")
    monkeypatch.setattr(child_process, "start_child", children)
    with pytest.raises(MacpipeError, match="ended without a result"):
        await Examiner(tmp_path).examine(REQUEST)
    children.module = "cluster.sandbox.child"  # reads on and never answers
    monkeypatch.setattr(examiner, "EXAMINE_S", 0.0)
    with pytest.raises(Busy, match="took more than"):
        await Examiner(tmp_path).examine(REQUEST)
    assert [child.returncode is not None for child in children.started] == [True, True]

    def refuse(*_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(child_process, "start_child", refuse)
    with pytest.raises(Busy, match="Resource temporarily unavailable"):
        await Examiner(tmp_path).examine(REQUEST)


@pytest.mark.anyio
async def test_one_examination_runs_at_a_time_and_ends_with_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children("")
    begun = asyncio.Event()

    async def hang(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(child_process, "start_child", children)
    monkeypatch.setattr(examiner, "_exchange", hang)
    one = Examiner(tmp_path)
    calls = [asyncio.create_task(one.examine(REQUEST)) for _ in range(2)]
    for number in (1, 2):
        await begun.wait()
        begun.clear()
        assert len(children.started) == number
        calls[number - 1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[number - 1]
        assert children.started[number - 1].returncode is not None
