"""Training events to protobuf messages and back. Adapters go in pieces, since a message is bounded."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.core.errors import VersionMismatch
from cluster.core.training_events import AdapterFile, TrainingEvent, TrainingNotice, TrainingReport
from cluster.core.training_limits import DATA_CHUNK_BYTES, MAX_STATE_BYTES
from cluster.v1 import cluster_pb2 as pb

__all__ = ["EventDecoder", "encode_event"]


def encode_event(event: TrainingEvent) -> Iterator[pb.TrainResponse]:
    """Yield the messages of an event."""
    match event:
        case TrainingReport():
            yield pb.TrainResponse(report=_encode_report(event))
        case TrainingNotice():
            yield pb.TrainResponse(notice=event.sentence)
        case AdapterFile():
            content = event.content
            for start in range(0, max(len(content), 1), DATA_CHUNK_BYTES):
                piece = content[start : start + DATA_CHUNK_BYTES]
                complete = start + DATA_CHUNK_BYTES >= len(content)
                adapters = pb.TrainAdapters(iteration=event.iteration, data=piece, complete=complete, final=event.final)
                yield pb.TrainResponse(adapters=adapters)


def _encode_report(report: TrainingReport) -> pb.TrainReport:
    return pb.TrainReport(
        iteration=report.iteration,
        train_loss=report.train_loss,
        val_loss=report.val_loss,
        test_loss=report.test_loss,
        learning_rate=report.learning_rate,
        tokens_per_second=report.tokens_per_second,
        trained_tokens=report.trained_tokens,
        seconds_left=report.seconds_left,
        peak_memory=[pb.PeakMemory(worker=worker, bytes=peak) for worker, peak in report.peak_memory],
    )


class EventDecoder:
    """Decodes the messages of one run in their order, and puts adapters together."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def decode(self, message: pb.TrainResponse) -> TrainingEvent | None:
        """Return the event that a message completes; None if it completes none. Raises ``VersionMismatch``."""
        match message.WhichOneof("event"):
            case "report":
                return _decode_report(message.report)
            case "notice":
                return TrainingNotice(message.notice)
            case "adapters":
                return self._add_piece(message.adapters)
        return None

    def _add_piece(self, piece: pb.TrainAdapters) -> AdapterFile | None:
        self._pieces.append(piece.data)
        if sum(map(len, self._pieces)) > 2 * MAX_STATE_BYTES:
            raise VersionMismatch("the coordinator sends adapters without end; update this client")
        if not piece.complete:
            return None
        content = b"".join(self._pieces)
        self._pieces.clear()
        return AdapterFile(piece.iteration, content, piece.final)


def _decode_report(report: pb.TrainReport) -> TrainingReport:
    return TrainingReport(
        iteration=report.iteration,
        train_loss=report.train_loss if report.HasField("train_loss") else None,
        val_loss=report.val_loss if report.HasField("val_loss") else None,
        test_loss=report.test_loss if report.HasField("test_loss") else None,
        learning_rate=report.learning_rate,
        tokens_per_second=report.tokens_per_second,
        trained_tokens=report.trained_tokens,
        seconds_left=report.seconds_left,
        peak_memory=tuple((peak.worker, peak.bytes) for peak in report.peak_memory),
    )
