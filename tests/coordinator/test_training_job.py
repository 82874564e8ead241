"""What a training job counts as training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator import training_job
from cluster.coordinator.training_job import TrainingJob
from cluster.coordinator.training_reports import TrainingReports
from cluster.core.training import TrainingOptions
from cluster.core.training_events import TrainingReport
from cluster.core.training_frames import DataBatch, Purpose
from cluster.scheduler.training_schedule import BatchResult

OPTIONS = TrainingOptions.of({"train": True, "iters": 1, "steps_per_report": 1})
BATCH = DataBatch(1, Purpose.TRAIN, 1, last=False, shape=(1, 2), tokens=b"", lengths=b"")


class Job(TrainingJob):
    """A job of one batch. Loading takes a minute, preparing another, and the batch two seconds."""

    def __init__(self) -> None:
        nothing: Any = SimpleNamespace(dialer=None, weights=None, roster=SimpleNamespace(pin=lambda workers: None))
        super().__init__(nothing, nothing, nothing, OPTIONS, nothing, lambda e: None, lambda p: None, {})
        self.now = 0.0
        self.reports = TrainingReports(OPTIONS, lambda: self.now)
        self.report: TrainingReport | None = None

    async def _load(self, assignment: object) -> None:
        self.now += 60

    async def _train(self, stages: object, schedule: object, training: object) -> None:
        self.now += 2
        self.report = self.reports.add(BatchResult(BATCH, 1.0, 10, 1e-5), {})


@pytest.mark.anyio
async def test_the_speed_does_not_count_the_time_of_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job()

    class Stages:
        def __init__(self, *_arguments: object) -> None: ...

        async def open(self, dialer: object) -> None: ...

        async def prepare(self, options: str) -> list[tuple[str, ...]]:
            job.now += 60
            return [("a",)]

        def close(self) -> None: ...

    monkeypatch.setattr(training_job, "TrainingStages", Stages)
    plan: Any = SimpleNamespace(epoch=1)
    assignment: Any = SimpleNamespace(plan=plan, workers=())
    await job._run_epoch(assignment)
    assert job.report
    assert job.report.tokens_per_second == 5.0


def test_the_time_left_does_not_count_the_step_that_compiles_kernels() -> None:
    now = 0.0
    reports = TrainingReports(TrainingOptions.of({"train": True, "iters": 100, "steps_per_report": 3}), lambda: now)

    def run(step: int, seconds: float) -> TrainingReport | None:
        nonlocal now
        now += seconds
        batch = DataBatch(step, Purpose.TRAIN, step, last=False, shape=(1, 2), tokens=b"", lengths=b"")
        return reports.add(BatchResult(batch, 1.0, 10, 1e-5), {})

    run(1, 60)
    assert reports.seconds_left == 0, "not known yet"
    run(2, 2)
    report = run(3, 2)
    assert report
    assert report.seconds_left == 2 * 97
    assert report.tokens_per_second == 30 / 64
    reports.restart()
    run(4, 60)
    run(5, 4)
    report = run(6, 4)
    assert report
    assert report.seconds_left == 4 * 94


@pytest.mark.anyio
async def test_a_training_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    job = Job()
    model_info: Any = SimpleNamespace(shape=SimpleNamespace(model=SimpleNamespace(name="/models/faq")))
    job._model_info = model_info
    assert job.refusal().sentence == (
        "the cluster is training adapters of faq, step 0 of 1; it serves again afterwards"
    )
    for _ in range(2):
        job._wait_for("a Mac: no worker is left")
    assert job.describe() == "training adapters of faq, step 0 of 1: waiting for a Mac: no worker is left"
    assert caplog.text.count("training: waiting reason=") == 1, "it is logged once"
    job._wait_for("")
    assert job.describe() == "training adapters of faq, step 0 of 1"
