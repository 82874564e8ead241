"""One exception tree. Each error knows its sentence, its machine-readable reason, its gRPC and its HTTP status.

The sentence names the cause and the way out; it is what a person sees, on every surface. Codes are plain strings and
numbers, so this module imports nothing. ``cluster.transport.rich_errors`` converts them to rich gRPC errors and back.
"""

from __future__ import annotations

from typing import ClassVar


class MacpipeError(Exception):
    """The root. ``details`` are short facts for machines (a worker's name, bytes missing), never text of a prompt."""

    reason: ClassVar[str] = "INTERNAL"
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, sentence: str, *, retry_after_s: float | None = None, field: str = "", **details: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.retry_after_s = retry_after_s
        self.field = field
        self.details = details

    @staticmethod
    def of(reason: str, sentence: str, worker: str = "") -> MacpipeError:
        """The error with that ``reason``, the root where there is none: how an error crosses a process's border."""
        kind = MacpipeError.kind(reason) or MacpipeError
        return kind(sentence, worker=worker) if worker else kind(sentence)

    @classmethod
    def kind(cls, reason: str) -> type[MacpipeError] | None:
        """The class of this tree with that ``reason``; None where there is none."""
        if cls.reason == reason:
            return cls
        return next((found for child in cls.__subclasses__() if (found := child.kind(reason))), None)


class InvalidRequest(MacpipeError):
    """A field of a request is missing, out of range or unknown; ``field`` names it."""

    reason, grpc_status, http_status = "INVALID_REQUEST", "INVALID_ARGUMENT", 400


class PromptTooLong(InvalidRequest):
    """Prompt and answer together do not fit the context that this cluster promises."""

    reason = "PROMPT_TOO_LONG"


class TooLarge(InvalidRequest):
    """A request's body is longer than we take."""

    reason, grpc_status, http_status = "TOO_LARGE", "RESOURCE_EXHAUSTED", 413


class Forbidden(MacpipeError):
    """A web page of another site asks, or one that pretends to be this machine."""

    reason, grpc_status, http_status = "FORBIDDEN", "PERMISSION_DENIED", 403


class Unauthenticated(MacpipeError):
    """Who asks has not shown who it is: no certificate of this cluster, or none that says anything."""

    reason, grpc_status, http_status = "UNAUTHENTICATED", "UNAUTHENTICATED", 401


class TokenRefused(MacpipeError):
    """A join token is unknown, expired, revoked, or was used by another Mac."""

    reason, grpc_status, http_status = "TOKEN_REFUSED", "PERMISSION_DENIED", 403


class NoCluster(MacpipeError):
    """Here is no cluster of that name, or not the machine that leads it."""

    reason, grpc_status, http_status = "NO_CLUSTER", "FAILED_PRECONDITION", 503


class ClusterDamaged(MacpipeError):
    """A file of a cluster's folder cannot be read, or is not what it was written as; the sentence names it."""

    reason, grpc_status, http_status = "CLUSTER_DAMAGED", "FAILED_PRECONDITION", 503


class ForeignAuthority(MacpipeError):
    """Who answers is of another cluster than the one that was asked for."""

    reason, grpc_status, http_status = "FOREIGN_AUTHORITY", "UNAUTHENTICATED", 401


class ClockWrong(MacpipeError):
    """A certificate is not valid at this time: somebody's clock is wrong, or it was not renewed."""

    reason, grpc_status, http_status = "CLOCK_WRONG", "FAILED_PRECONDITION", 503


class MemberNotFound(MacpipeError):
    """No member of the cluster, or no token, has this name."""

    reason, grpc_status, http_status = "MEMBER_NOT_FOUND", "NOT_FOUND", 404


class InvalidGrammar(InvalidRequest):
    """What an answer is asked to be cannot be enforced; the sentence has the compiler's reason."""

    reason = "INVALID_GRAMMAR"


class InvalidOption(MacpipeError):
    """A command-line option makes no sense here; the command exits with 2."""

    reason, grpc_status, http_status = "INVALID_OPTION", "INVALID_ARGUMENT", 400


class ModelNotFound(MacpipeError):
    """No such model folder, or no such model is being served."""

    reason, grpc_status, http_status = "MODEL_NOT_FOUND", "NOT_FOUND", 404


class BadCheckpoint(MacpipeError):
    """The folder is there, but it is not a checkpoint that can be served (pickle files, damaged headers)."""

    reason, grpc_status, http_status = "BAD_CHECKPOINT", "FAILED_PRECONDITION", 400


class ModelUnsupported(MacpipeError):
    """The architecture is unknown to mlx-lm, or cannot be sliced (looped models)."""

    reason, grpc_status, http_status = "MODEL_UNSUPPORTED", "FAILED_PRECONDITION", 400


class ModelDiffers(MacpipeError):
    """A worker's copy of the model is not the coordinator's."""

    reason, grpc_status, http_status = "MODEL_DIFFERS", "FAILED_PRECONDITION", 503


class ModelForbidden(MacpipeError):
    """The hub does not give this model to this account: it is gated or private, or the token is wrong."""

    reason, grpc_status, http_status = "MODEL_FORBIDDEN", "PERMISSION_DENIED", 403


class HubUnreachable(MacpipeError):
    """The hub does not answer."""

    reason, grpc_status, http_status = "HUB_UNREACHABLE", "UNAVAILABLE", 503


class HubOffline(HubUnreachable):
    """Offline mode forbids to ask the hub."""

    reason, grpc_status = "HUB_OFFLINE", "FAILED_PRECONDITION"


class FetchFailed(MacpipeError):
    """Bytes of a model could be had from nobody, or only damaged ones."""

    reason, grpc_status, http_status = "FETCH_FAILED", "DATA_LOSS", 502


class DiskFull(MacpipeError):
    """A disk does not take what has to be written: it is full, over its quota, or fails. The sentence says which."""

    reason, grpc_status, http_status = "DISK_FULL", "RESOURCE_EXHAUSTED", 507


class NoPlan(MacpipeError):
    """The layers cannot be laid over these workers as asked."""

    reason, grpc_status, http_status = "NO_PLAN", "FAILED_PRECONDITION", 503


class DoesNotFit(NoPlan):
    """There is not enough memory; the sentence says how many GiB are missing."""

    reason, grpc_status = "DOES_NOT_FIT", "RESOURCE_EXHAUSTED"


class NoWorkers(MacpipeError):
    """Fewer workers answered than were asked for."""

    reason, grpc_status, http_status = "NO_WORKERS", "UNAVAILABLE", 503


class DuplicateName(MacpipeError):
    """Two workers of one cluster carry one name."""

    reason, grpc_status, http_status = "DUPLICATE_NAME", "FAILED_PRECONDITION", 503


class DuplicateId(MacpipeError):
    """Two living coordinators, or two workers, have one id: the state folder of one was copied from the other."""

    reason, grpc_status, http_status = "DUPLICATE_ID", "FAILED_PRECONDITION", 503


class VersionMismatch(MacpipeError):
    """A worker runs another version of macpipe or of mlx-lm."""

    reason, grpc_status, http_status = "VERSION_MISMATCH", "FAILED_PRECONDITION", 503


class WorkerLost(MacpipeError):
    """A stage went away or stopped answering; the sentence names the worker."""

    reason, grpc_status, http_status = "WORKER_LOST", "UNAVAILABLE", 503


class WorkerRefused(WorkerLost):
    """Nobody listens where the worker should be: its machine answers, its process is gone."""

    reason = "WORKER_REFUSED"


class WorkerReplaced(WorkerLost):
    """Another worker of the cluster answers where this one was."""

    reason = "WORKER_REPLACED"


class FrameOverdue(WorkerLost):
    """Nothing came through the stages for longer than they can need: one of them hangs."""

    reason = "FRAME_OVERDUE"


class WorkerTaken(MacpipeError):
    """A worker serves another coordinator."""

    reason, grpc_status, http_status = "WORKER_TAKEN", "FAILED_PRECONDITION", 503


class StageFailed(MacpipeError):
    """A stage answered that it could not do a step."""

    reason, grpc_status, http_status = "STAGE_FAILED", "INTERNAL", 500


class NotServing(MacpipeError):
    """No model is loaded, or it is being loaded."""

    reason, grpc_status, http_status = "NOT_SERVING", "UNAVAILABLE", 503


class Unreachable(MacpipeError):
    """Nobody answers at an address."""

    reason, grpc_status, http_status = "UNREACHABLE", "UNAVAILABLE", 503


class PortClosed(Unreachable):
    """Nothing listens at the address: the process that did has ended."""

    reason = "PORT_CLOSED"


class LinkFailed(MacpipeError):
    """A stage cannot reach the one before it; the coordinator relays that hop instead."""

    reason, grpc_status, http_status = "LINK_FAILED", "FAILED_PRECONDITION", 503


class PortInUse(MacpipeError):
    """Another program listens on the address."""

    reason, grpc_status, http_status = "PORT_IN_USE", "FAILED_PRECONDITION", 503


class Busy(MacpipeError):
    """The queue is full; ``retry_after_s`` says when to come back."""

    reason, grpc_status, http_status = "BUSY", "RESOURCE_EXHAUSTED", 429


class LimitReached(MacpipeError):
    """An API key has used what it may for now; the sentence has the figures, ``retry_after_s`` when there is more."""

    reason, grpc_status, http_status = "LIMIT_REACHED", "RESOURCE_EXHAUSTED", 429


class SlowReader(MacpipeError):
    """A client left too many token events unread."""

    reason, grpc_status, http_status = "SLOW_READER", "RESOURCE_EXHAUSTED", 429


class OtherParty(Unreachable):
    """Who answers there is of the cluster, and not who was meant."""

    reason = "OTHER_PARTY"


class DeadlineExceeded(MacpipeError):
    """The request's own deadline passed."""

    reason, grpc_status, http_status = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 408


class Aborted(MacpipeError):
    """Somebody asked for the request to end: its client went away, or Abort was called."""

    reason, grpc_status, http_status = "ABORTED", "CANCELLED", 499


class RequestNotFound(MacpipeError):
    """No live request has this id."""

    reason, grpc_status, http_status = "REQUEST_NOT_FOUND", "NOT_FOUND", 404


class BadFrame(MacpipeError):
    """Bytes from a peer are not a frame, or break a bound."""

    reason, grpc_status, http_status = "BAD_FRAME", "INVALID_ARGUMENT", 400


class StaleEpoch(MacpipeError):
    """A frame or stream of another epoch than the one that is loaded."""

    reason, grpc_status, http_status = "STALE_EPOCH", "FAILED_PRECONDITION", 409
