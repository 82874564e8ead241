"""Shows a training: losses on stdout, one line or one JSON object a report; everything else on stderr."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TextIO

import typer

from cluster.cli.json_output import print_json
from cluster.cli.load_progress import LoadBars
from cluster.cli.screen import format_bytes, format_duration, note
from cluster.core.plan import LoadProgress
from cluster.core.training_events import TrainingEvent, TrainingNotice, TrainingReport

__all__ = ["TrainingScreen"]


class TrainingScreen:
    """Prints the events of one run of ``iters`` steps."""

    def __init__(self, stream: TextIO, iters: int, *, json: bool) -> None:
        self._bars = LoadBars(stream)
        self._iters, self._json = iters, json

    def show(self, event: TrainingEvent | LoadProgress) -> None:
        """Print an event; ``saved`` prints that of adapters, once they are stored."""
        if isinstance(event, LoadProgress):
            self._bars.show(event)
            return
        self._bars.close()
        if isinstance(event, TrainingNotice):
            note(event.sentence)
        elif isinstance(event, TrainingReport):
            if self._json:
                print_json(_facts(event))
            else:
                typer.echo(self._line(event))

    def saved(self, file: Path) -> None:
        """Print where adapters were stored."""
        note(f"adapters saved to {file}")

    def close(self) -> None:
        """Stop drawing bars."""
        self._bars.close()

    def _line(self, report: TrainingReport) -> str:
        if report.test_loss is not None:
            return f"test loss {report.test_loss:.3f}, perplexity {_perplexity(report.test_loss):.3f}"
        if report.val_loss is not None:  # before the step, which mlx_lm.lora shows; its callbacks get the one before
            return f"step {report.iteration + 1} of {self._iters}: validation loss {report.val_loss:.3f}"
        peaks = ", ".join(f"{worker} {format_bytes(peak)}" for worker, peak in report.peak_memory)
        left = f", {format_duration(report.seconds_left)} left" if report.seconds_left else ""
        left = ", done" if report.iteration == self._iters else left
        return (
            f"step {report.iteration} of {self._iters}: training loss {report.train_loss or 0.0:.3f}, "
            f"learning rate {report.learning_rate:.3g}, {report.tokens_per_second:.0f} tokens/s{left}; "
            f"peak memory: {peaks}"
        )


def _facts(report: TrainingReport) -> dict[str, Any]:
    """Return the facts of a report by mlx-lm's names."""
    if report.test_loss is not None:
        return {"iteration": report.iteration, "test_loss": report.test_loss,
                "test_perplexity": _perplexity(report.test_loss)}  # fmt: skip
    if report.val_loss is not None:
        return {"iteration": report.iteration, "val_loss": report.val_loss}
    return {
        "iteration": report.iteration,
        "train_loss": report.train_loss,
        "learning_rate": report.learning_rate,
        "tokens_per_second": report.tokens_per_second,
        "trained_tokens": report.trained_tokens,
        "seconds_left": report.seconds_left,
        "peak_memory": dict(report.peak_memory),
    }


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
