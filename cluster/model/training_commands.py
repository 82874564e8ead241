"""Carries out the coordinator's commands of training on one stage: frames in, frames out.

It checks what comes in, and converts between a message's raw tensors and arrays. It knows nothing of streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from cluster.core.errors import BadFrame, StaleEpoch
from cluster.core.frames import Tensor
from cluster.core.limits import MAX_ROWS
from cluster.core.plan import StageSpec
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import Task, TrainingCommand, TrainingReply, split_state
from cluster.core.training_limits import (
    MAX_SEQUENCE,
    MAX_STATE_TENSORS,
)
from cluster.model import device
from cluster.model.tensor_codec import pack, to_array, unpack
from cluster.model.training_stage import TrainingStage, load_training_stage

__all__ = ["TrainingCommands"]


class TrainingCommands:
    """The commands of one stage. Only the thread that made it may use it."""

    def __init__(self, stage: TrainingStage) -> None:
        self._stage = stage
        self._parts: list[dict[str, mx.array]] = []
        """The parts of the state that is being read."""
        self._written: dict[str, mx.array] = {}
        """The state that is being written."""

    @staticmethod
    def prepare(spec: StageSpec, path: Path, command: TrainingCommand) -> tuple[TrainingCommands, TrainingReply]:
        """Load the stage that ``spec`` describes for training, from the checkpoint in ``path``, and reply.

        Raises InvalidOption and the errors of ``load_training_stage``.
        """
        stage = load_training_stage(spec, path, TrainingOptions.from_json(command.options))
        if len(stage.names) > MAX_STATE_TENSORS:
            raise BadFrame(f"a stage can train at most {MAX_STATE_TENSORS} tensors, not {len(stage.names)}")
        reply = TrainingReply(command.epoch, command.number, names=stage.names, trained=stage.trained)
        return TrainingCommands(stage), reply

    def run(self, command: TrainingCommand) -> TrainingReply:
        """Carry out a command other than PREPARE.

        Raises StaleEpoch, BadFrame and InvalidOption; MLX and the model's code may raise anything.
        """
        if command.epoch != self._stage.spec.epoch:
            raise StaleEpoch(f"the command has epoch {command.epoch}, but this stage has {self._stage.spec.epoch}")
        match command.task:
            case Task.FORWARD:
                return self._forward(command)
            case Task.BACKWARD:
                return self._backward(command)
            case Task.READ_STATE:
                return self._read(command)
            case Task.WRITE_STATE:
                return self._write(command)
            case Task.PREPARE:
                raise BadFrame("this stage trains already")

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()
        self._parts.clear()
        self._written.clear()

    def _forward(self, command: TrainingCommand) -> TrainingReply:
        batch, lengths = _tokens(command.tensors)
        rows, width = batch.shape
        incoming = unpack(command.tensors[2:], self._stage.part.inlet, rows, width - 1)
        if self._stage.spec.last:
            loss, outgoing = self._stage.loss(
                batch,
                lengths,
                incoming,
                train=command.train,
                gradient=command.gradient,
                update=command.update,
                weight=command.weight,
            )
            return self._reply(command, outgoing, loss.loss, loss.tokens)
        outgoing = self._stage.forward(command.batch, batch, incoming, train=command.train, gradient=command.gradient)
        return self._reply(command, outgoing)

    def _backward(self, command: TrainingCommand) -> TrainingReply:
        rows, length = command.tensors[0].shape[:2] if command.tensors and len(command.tensors[0].shape) > 1 else (0, 0)
        gradients = unpack(command.tensors, self._stage.part.outlet, rows, length)
        return self._reply(command, self._stage.backward(command.batch, gradients, update=command.update))

    def _read(self, command: TrainingCommand) -> TrainingReply:
        if command.part == 0:
            self._parts = split_state(self._stage.state(), lambda array: array.nbytes)
        if command.part >= max(1, len(self._parts)):
            raise BadFrame(f"the state has {len(self._parts)} parts; part {command.part} was asked for")
        part = self._parts[command.part] if self._parts else {}
        arrays = [mx.contiguous(array) for array in part.values()]
        mx.eval(arrays)
        tensors = tuple(pack(array) for array in arrays)
        return TrainingReply(
            command.epoch, command.number, names=tuple(part), tensors=tensors, parts=max(1, len(self._parts))
        )

    def _write(self, command: TrainingCommand) -> TrainingReply:
        if len(command.names) != len(command.tensors):
            raise BadFrame(f"a state has {len(command.names)} names but {len(command.tensors)} tensors")
        self._written |= dict(zip(command.names, map(to_array, command.tensors), strict=True))
        if command.update:
            self._stage.restore(self._written)
            self._written = {}
        return TrainingReply(command.epoch, command.number)

    def _reply(
        self, command: TrainingCommand, outgoing: Sequence[mx.array], loss: float = 0.0, counted: int = 0
    ) -> TrainingReply:
        return TrainingReply(
            command.epoch,
            command.number,
            tensors=tuple(pack(array) for array in outgoing),
            loss=loss,
            counted=counted,
            learning_rate=self._stage.learning_rate,
            peak_bytes=device.memory_peak(),
        )


def _tokens(tensors: Sequence[Tensor]) -> tuple[mx.array, mx.array]:
    """Return a batch's tokens and lengths. Raises BadFrame if they do not belong together."""
    if len(tensors) < 2 or any(t.dtype != "int32" or len(t.shape) != 2 for t in tensors[:2]):
        raise BadFrame("a batch has no tokens or no lengths")
    (rows, width), lengths = tensors[0].shape, tensors[1].shape
    if not (1 <= rows <= MAX_ROWS and 2 <= width <= MAX_SEQUENCE + 1 and lengths == (rows, 2)):
        raise BadFrame(f"a batch has tokens of shape {[rows, width]} and lengths of shape {list(lengths)}")
    return to_array(tensors[0]), to_array(tensors[1])
