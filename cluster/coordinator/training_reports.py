"""Sum losses as mlx-lm does, in float32 and in its order, and say when a report is due. Does no I/O; reads a clock."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from cluster.core.training import TrainingOptions
from cluster.core.training_events import TrainingReport
from cluster.core.training_frames import Purpose
from cluster.scheduler.training_schedule import BatchResult

__all__ = ["TrainingReports"]


class TrainingReports:
    """Takes the results of batches in their order. One that was counted already, before a loss of a Mac, is ignored.

    Results of micro-batches are counted as one of their batch.
    """

    def __init__(self, options: TrainingOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self.iteration = 0
        """The last training step that was counted."""
        self._last = 0
        self._at = clock()
        self._train_s = 0.0
        self._step_s = 0.0
        self._cold = True
        self._timed_s, self._timed_steps = 0.0, 0
        """Time and number of the steps since the last report, without those that also compiled kernels."""
        self._losses, self._steps, self._tokens, self._trained_tokens = 0.0, 0, 0, 0
        self._evaluated, self._evaluated_tokens = 0.0, 0
        self._batch_loss, self._batch_tokens = 0.0, 0
        """The micro-batches of the present batch that were counted."""

    @property
    def seconds_left(self) -> float:
        """Return how long the rest of the training takes at the present speed; 0 if that is not known yet."""
        return self._step_s * max(0, self._options.iters - self.iteration)

    def pause(self) -> None:
        """Do not count the time since the last result: nothing was trained."""
        self._at = self._clock()

    def restart(self) -> None:
        """Count as ``pause``. The next step is no measure of the speed either: it compiles the kernels."""
        self.pause()
        self._cold = True

    def add(self, result: BatchResult, peaks: Mapping[str, int]) -> TrainingReport | None:
        """Count a result. Return the report that is due now, if one is. ``peaks`` are the peak bytes of each worker."""
        if result.batch.number <= self._last:
            return None
        self._last = result.batch.number
        loss, counted = self._batch_loss + result.loss * result.batch.weight, self._batch_tokens + result.counted
        if not result.batch.ends_batch:
            self._batch_loss, self._batch_tokens = loss, counted
            return None
        self._batch_loss, self._batch_tokens = 0.0, 0
        result = replace(result, loss=_float32(loss), counted=counted)
        now = self._clock()
        elapsed_s, self._at = now - self._at, now
        if result.batch.purpose is Purpose.TRAIN:
            self._train_s += elapsed_s
            if not self._cold:
                self._timed_s += elapsed_s
                self._timed_steps += 1
            self._cold = False
            return self._add_trained(result, peaks)
        return self._add_evaluated(result)

    def _add_trained(self, result: BatchResult, peaks: Mapping[str, int]) -> TrainingReport | None:
        self.iteration = result.batch.iteration
        self._losses = _float32(self._losses + result.loss)
        self._steps += 1
        self._tokens += result.counted
        if self.iteration % self._options.steps_per_report and self.iteration != self._options.iters:
            return None
        self._trained_tokens += self._tokens
        if self._timed_steps:
            self._step_s = self._timed_s / self._timed_steps
        report = TrainingReport(
            self.iteration,
            train_loss=self._losses / self._steps,
            learning_rate=result.learning_rate,
            tokens_per_second=self._tokens / self._train_s if self._train_s else 0.0,
            trained_tokens=self._trained_tokens,
            seconds_left=self.seconds_left,
            peak_memory=tuple(peaks.items()),
        )
        self._losses, self._steps, self._tokens, self._train_s = 0.0, 0, 0, 0.0
        self._timed_s, self._timed_steps = 0.0, 0
        return report

    def _add_evaluated(self, result: BatchResult) -> TrainingReport | None:
        self._evaluated = _float32(self._evaluated + _float32(result.loss * result.counted))
        self._evaluated_tokens += result.counted
        if not result.batch.last:
            return None
        tokens = self._evaluated_tokens
        loss = _float32(self._evaluated / tokens) if tokens else float("nan")
        self._evaluated, self._evaluated_tokens = 0.0, 0
        if result.batch.purpose is Purpose.TEST:
            return TrainingReport(result.batch.iteration, test_loss=loss)
        return TrainingReport(result.batch.iteration - 1, val_loss=loss)  # the step that it follows, as in mlx-lm


def _float32(value: float) -> float:
    """Round to float32. The sum, product or quotient of two float32 numbers is then that of float32 arithmetic."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
