"""What a training job counts as training."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator import training_job
from cluster.coordinator.training_job import TrainingJob
from cluster.coordinator.training_reports import TrainingReports
from cluster.core.training import TrainingOptions
from cluster.core.training_events import TrainingReport
from cluster.core.training_frames import DataBatch, Purpose, Task
from cluster.scheduler.training_schedule import BatchResult, TrainingOrder

OPTIONS = TrainingOptions.of({"train": True, "iters": 1, "steps_per_report": 1})
BATCH = DataBatch(1, Purpose.TRAIN, 1, last=False, shape=(1, 2), tokens=b"", lengths=b"")


class Job(TrainingJob):
    """A job of one batch. Loading takes a minute, preparing another, and the batch two seconds."""

    def __init__(self) -> None:
        roster = SimpleNamespace(pin=lambda workers: None, take_term=None)
        nothing: Any = SimpleNamespace(dialer=None, weights=None, roster=roster)
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


def test_the_micro_batches_of_a_batch_are_counted_as_one_step() -> None:
    reports = TrainingReports(TrainingOptions.of({"train": True, "iters": 4, "steps_per_report": 2}), lambda: 0.0)

    def add(
        number: int, purpose: Purpose, step: int, loss: float, weight: float, *, ends: bool
    ) -> TrainingReport | None:
        batch = DataBatch(number, purpose, step, True, (1, 2), b"", b"", weight, ends)
        return reports.add(BatchResult(batch, loss, int(weight * 12), 1e-5), {})

    assert add(1, Purpose.VALIDATE, 1, 2.0, 0.25, ends=False) is None
    report = add(2, Purpose.VALIDATE, 1, 4.0, 0.75, ends=True)
    assert report == TrainingReport(0, val_loss=3.5)
    assert add(3, Purpose.TRAIN, 1, 2.0, 0.25, ends=False) is None
    assert reports.iteration == 0
    for number, loss, weight in ((1, 9.0, 0.25), (2, 9.0, 0.75), (3, 9.0, 0.25)):  # again, after a loss of a Mac
        assert add(number, Purpose.TRAIN, 1, loss, weight, ends=number == 2) is None
    assert add(4, Purpose.TRAIN, 1, 4.0, 0.75, ends=True) is None
    assert reports.iteration == 1
    report = add(5, Purpose.TRAIN, 2, 1.5, 1.0, ends=True)
    assert report
    assert (report.iteration, report.train_loss, report.trained_tokens) == (2, 2.5, 24)


@pytest.mark.anyio
async def test_updates_and_kept_states_follow_whole_batches() -> None:
    job = Job()
    part = DataBatch(
        1, Purpose.TRAIN, 1, last=True, shape=(1, 2), tokens=b"", lengths=b"", weight=0.25, ends_batch=False
    )
    assert not job._is_update(part)
    assert not job._is_due(part)
    ends = replace(part, number=2, weight=0.75, ends_batch=True)
    assert job._is_update(ends)
    assert job._is_due(ends)
    command = training_job._command(TrainingOrder(1, Task.FORWARD, part, (), gradient=True, update=False))(1, 2)
    assert (command.weight, command.batch, command.update) == (0.25, 1, False)


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
