"""A disturbed measurement is repeated, and the fastest one is kept until the next start."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.plan import Profile
from cluster.worker.pipe_messages import Measured
from cluster.worker.profile_file import ProfileFile
from cluster.worker.profile_provider import MAX_TRIES, request_measurement
from cluster.worker.supervisor import Supervisor

FAST, SLOW = Profile(4e11, 1e-5, 1e-4, 1e13, 0.2), Profile(5e10, 1e-4, 1e-3, 1e12, 0.9)
BUSY = "other programs left 50% of a processor"


class Engine:
    """Answers with these measurements, in order."""

    def __init__(self, *answers: tuple[Profile, str] | MacpipeError) -> None:
        self.left = list(answers)

    async def ask(self, kind: type, timeout_s: float) -> Measured:
        answer = self.left.pop(0)
        if isinstance(answer, MacpipeError):
            raise answer
        return Measured.of(1, *answer)


async def measured(path: Path, engine: Engine) -> ProfileFile:
    file = ProfileFile(path, "k")
    await request_measurement(cast(Supervisor, engine), file, pause_s=0)
    return ProfileFile(path, "k")  # as the next start reads it


@pytest.mark.anyio
async def test_a_quiet_measurement_is_kept_at_once(tmp_path: Path) -> None:
    engine = Engine((FAST, ""), (SLOW, ""))
    kept = (await measured(tmp_path / "p", engine)).kept
    assert (kept.profile, kept.disturbed, len(engine.left)) == (FAST, "", 1)


@pytest.mark.anyio
async def test_a_busy_moment_is_waited_for(tmp_path: Path) -> None:
    kept = (await measured(tmp_path / "p", Engine((SLOW, BUSY), (FAST, "")))).kept
    assert (kept.profile, kept.disturbed) == (FAST, "")


@pytest.mark.anyio
async def test_the_fastest_counts_if_all_were_disturbed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = [(SLOW, BUSY), (FAST, BUSY), *[(SLOW, BUSY)] * (MAX_TRIES - 2)]
    kept = (await measured(tmp_path / "p", Engine(*answers))).kept
    assert (kept.profile, kept.disturbed) == (FAST, BUSY)
    assert "profile: may be too slow, the next start measures again reason=other programs" in caplog.text


@pytest.mark.anyio
async def test_a_disturbed_measurement_does_not_replace_a_faster_one(tmp_path: Path) -> None:
    ProfileFile(tmp_path / "p", "k").put(FAST)
    kept = (await measured(tmp_path / "p", Engine(*[(SLOW, BUSY)] * MAX_TRIES))).kept
    assert (kept.profile, kept.disturbed) == (FAST, "")


@pytest.mark.anyio
async def test_an_engine_that_fails_later_leaves_what_it_measured(tmp_path: Path) -> None:
    kept = (await measured(tmp_path / "p", Engine((SLOW, BUSY), WorkerLost("it died", worker="a")))).kept
    assert (kept.profile, kept.disturbed) == (SLOW, BUSY)
