"""What a training run tells its client: reports, adapters, and sentences for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """A loss after a training step. One of the three losses is set.

    ``train_loss`` is the mean over the steps since the last report; ``learning_rate``, ``tokens_per_second`` and
    ``seconds_left`` (0: not known) come with it. ``val_loss`` is that before the step after ``iteration``.
    ``peak_memory`` has the peak bytes of each worker in this training, by name.
    """

    iteration: int
    train_loss: float | None = None
    val_loss: float | None = None
    test_loss: float | None = None
    learning_rate: float = 0.0
    tokens_per_second: float = 0.0
    trained_tokens: int = 0
    seconds_left: float = 0.0
    peak_memory: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The adapters after a training step, as the content of a safetensors file. ``final``: training is done."""

    iteration: int
    content: bytes
    final: bool


@dataclass(frozen=True, slots=True)
class TrainingNotice:
    """A sentence for people: a Mac was lost, sequences were cut."""

    sentence: str


TrainingEvent = TrainingReport | AdapterFile | TrainingNotice
