"""The exception hierarchy. Each error has a sentence, a machine-readable reason, a gRPC status and an HTTP status.

The sentence says what failed, why and what to do; people see it on every surface. Codes are plain strings and numbers,
so this module imports no library. ``cluster.transport.rich_errors`` converts them to rich gRPC errors and back.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why something failed, for code: one reason for each error class. It crosses processes and Macs as its value."""

    INTERNAL = "INTERNAL"
    INVALID_REQUEST = "INVALID_REQUEST"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    TOO_LARGE = "TOO_LARGE"
    FORBIDDEN = "FORBIDDEN"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    MEMBER_REMOVED = "MEMBER_REMOVED"
    TOKEN_REFUSED = "TOKEN_REFUSED"  # noqa: S105  # a name
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"  # noqa: S105
    NO_CLUSTER = "NO_CLUSTER"
    AUTHORITY_ELSEWHERE = "AUTHORITY_ELSEWHERE"
    CLUSTER_DAMAGED = "CLUSTER_DAMAGED"
    FOREIGN_AUTHORITY = "FOREIGN_AUTHORITY"
    CLOCK_WRONG = "CLOCK_WRONG"
    MEMBER_NOT_FOUND = "MEMBER_NOT_FOUND"
    INVALID_GRAMMAR = "INVALID_GRAMMAR"
    INVALID_OPTION = "INVALID_OPTION"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_IN_USE = "MODEL_IN_USE"
    BAD_CHECKPOINT = "BAD_CHECKPOINT"
    MODEL_UNSUPPORTED = "MODEL_UNSUPPORTED"
    MODEL_DIFFERS = "MODEL_DIFFERS"
    MODEL_FORBIDDEN = "MODEL_FORBIDDEN"
    HUB_UNREACHABLE = "HUB_UNREACHABLE"
    HUB_OFFLINE = "HUB_OFFLINE"
    FETCH_FAILED = "FETCH_FAILED"
    DISK_FULL = "DISK_FULL"
    PREFIX_MISSING = "PREFIX_MISSING"
    NO_PLAN = "NO_PLAN"
    DOES_NOT_FIT = "DOES_NOT_FIT"
    MODEL_TOO_LARGE = "MODEL_TOO_LARGE"
    NO_WORKERS = "NO_WORKERS"
    DUPLICATE_NAME = "DUPLICATE_NAME"
    DUPLICATE_ID = "DUPLICATE_ID"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    WORKER_LOST = "WORKER_LOST"
    WORKER_REFUSED = "WORKER_REFUSED"
    WORKER_REPLACED = "WORKER_REPLACED"
    FRAME_OVERDUE = "FRAME_OVERDUE"
    WORKER_TAKEN = "WORKER_TAKEN"
    STAGE_FAILED = "STAGE_FAILED"
    RANK_FAILED = "RANK_FAILED"
    INSECURE_GROUP = "INSECURE_GROUP"
    NOT_SERVING = "NOT_SERVING"
    LOAD_ENDED = "LOAD_ENDED"
    UNREACHABLE = "UNREACHABLE"
    PORT_CLOSED = "PORT_CLOSED"
    CONNECTION_LOST = "CONNECTION_LOST"
    LINK_FAILED = "LINK_FAILED"
    PORT_IN_USE = "PORT_IN_USE"
    BUSY = "BUSY"
    LIMIT_REACHED = "LIMIT_REACHED"
    SLOW_READER = "SLOW_READER"
    OTHER_PARTY = "OTHER_PARTY"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    ABORTED = "ABORTED"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    ANSWER_LOST = "ANSWER_LOST"
    ANSWER_DIFFERS = "ANSWER_DIFFERS"
    REQUEST_ENDED = "REQUEST_ENDED"
    BAD_FRAME = "BAD_FRAME"
    STALE_EPOCH = "STALE_EPOCH"
    STALE_TERM = "STALE_TERM"
    NOT_LEADER = "NOT_LEADER"

    @classmethod
    def parse(cls, text: str) -> Reason:
        """Return the reason with that value; INTERNAL if this version does not know it."""
        return cls(text) if text in cls.__members__ else cls.INTERNAL


class MacpipeError(Exception):
    """Base of all errors. ``details`` are short facts for machines (a worker's name, bytes missing), never prompts."""

    reason: ClassVar[Reason] = Reason.INTERNAL
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, sentence: str, *, retry_after_s: float | None = None, field: str = "", **details: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.retry_after_s = retry_after_s
        self.field = field
        self.details = details

    @staticmethod
    def of(reason: Reason, sentence: str, worker: str = "") -> MacpipeError:
        """Return the error with that ``reason``. Recreates an error of another process."""
        kind = MacpipeError.kind(reason) or MacpipeError  # the class may be in a module that is not loaded here
        return kind(sentence, worker=worker) if worker else kind(sentence)

    @classmethod
    def kind(cls, reason: str) -> type[MacpipeError] | None:
        """Return the subclass with that ``reason``; None if there is none."""
        if cls.reason == reason:
            return cls
        return next((found for child in cls.__subclasses__() if (found := child.kind(reason))), None)


class InvalidRequest(MacpipeError):
    """A field of a request is missing, out of range or unknown; ``field`` names it."""

    reason, grpc_status, http_status = Reason.INVALID_REQUEST, "INVALID_ARGUMENT", 400


class PromptTooLong(InvalidRequest):
    """Prompt and answer together exceed the context that this cluster serves.

    ``details`` has numbers of tokens: ``tokens`` of the prompt (at least) and the ``maximum`` of a prompt; or
    ``tokens``, ``max_tokens`` and ``context``.
    """

    reason = Reason.PROMPT_TOO_LONG


class TooLarge(InvalidRequest):
    """A request's body is too long."""

    reason, grpc_status, http_status = Reason.TOO_LARGE, "RESOURCE_EXHAUSTED", 413


class Forbidden(MacpipeError):
    """A web page of another site called the API, or a host that pretends to be this machine."""

    reason, grpc_status, http_status = Reason.FORBIDDEN, "PERMISSION_DENIED", 403


class Unauthenticated(MacpipeError):
    """The caller did not authenticate: it has no certificate of this cluster, or an unusable one."""

    reason, grpc_status, http_status = Reason.UNAUTHENTICATED, "UNAUTHENTICATED", 401


class MemberRemoved(Unauthenticated):
    """The caller was removed from the cluster: its certificate is revoked."""

    reason = Reason.MEMBER_REMOVED


class TokenRefused(MacpipeError):
    """A join token is unknown, expired, revoked, or was used by another Mac."""

    reason, grpc_status, http_status = Reason.TOKEN_REFUSED, "PERMISSION_DENIED", 403


class NoCluster(MacpipeError):
    """There is no cluster of that name on this machine, or the machine does not lead it."""

    reason, grpc_status, http_status = Reason.NO_CLUSTER, "FAILED_PRECONDITION", 503


class AuthorityElsewhere(MacpipeError):
    """The cluster's authority is on another Mac: this one cannot admit members or renew certificates."""

    reason, grpc_status, http_status = Reason.AUTHORITY_ELSEWHERE, "FAILED_PRECONDITION", 503


class ClusterDamaged(MacpipeError):
    """A file of a cluster's folder cannot be read or is damaged; the sentence names it."""

    reason, grpc_status, http_status = Reason.CLUSTER_DAMAGED, "FAILED_PRECONDITION", 503


class ForeignAuthority(MacpipeError):
    """The peer belongs to another cluster than the expected one."""

    reason, grpc_status, http_status = Reason.FOREIGN_AUTHORITY, "UNAUTHENTICATED", 401


class ClockWrong(MacpipeError):
    """A certificate is not valid now: a clock is wrong, or the certificate was not renewed."""

    reason, grpc_status, http_status = Reason.CLOCK_WRONG, "FAILED_PRECONDITION", 503


class MemberNotFound(MacpipeError):
    """No member of the cluster, or no token, has this name."""

    reason, grpc_status, http_status = Reason.MEMBER_NOT_FOUND, "NOT_FOUND", 404


class InvalidGrammar(InvalidRequest):
    """The requested form of an answer cannot be enforced; the sentence has the compiler's reason."""

    reason = Reason.INVALID_GRAMMAR


class InvalidOption(MacpipeError):
    """A command-line option is invalid here; the command exits with 2."""

    reason, grpc_status, http_status = Reason.INVALID_OPTION, "INVALID_ARGUMENT", 400


class ModelNotFound(MacpipeError):
    """There is no such model folder, or no such model is served."""

    reason, grpc_status, http_status = Reason.MODEL_NOT_FOUND, "NOT_FOUND", 404


class ModelInUse(MacpipeError):
    """A process of this machine uses the model, so it cannot be removed."""

    reason, grpc_status, http_status = Reason.MODEL_IN_USE, "FAILED_PRECONDITION", 409


class BadCheckpoint(MacpipeError):
    """The folder exists but is not a checkpoint that can be served (pickle files, damaged headers)."""

    reason, grpc_status, http_status = Reason.BAD_CHECKPOINT, "FAILED_PRECONDITION", 400


class ModelUnsupported(MacpipeError):
    """mlx-lm does not know the architecture, or it cannot be sliced (looped models)."""

    reason, grpc_status, http_status = Reason.MODEL_UNSUPPORTED, "FAILED_PRECONDITION", 400


class ModelDiffers(MacpipeError):
    """A worker's copy of the model differs from the coordinator's."""

    reason, grpc_status, http_status = Reason.MODEL_DIFFERS, "FAILED_PRECONDITION", 503


class ModelForbidden(MacpipeError):
    """The hub denies this account the model: it is gated or private, or the token is wrong."""

    reason, grpc_status, http_status = Reason.MODEL_FORBIDDEN, "PERMISSION_DENIED", 403


class HubUnreachable(MacpipeError):
    """The hub does not answer."""

    reason, grpc_status, http_status = Reason.HUB_UNREACHABLE, "UNAVAILABLE", 503


class HubOffline(HubUnreachable):
    """Offline mode forbids requests to the hub."""

    reason, grpc_status = Reason.HUB_OFFLINE, "FAILED_PRECONDITION"


class FetchFailed(MacpipeError):
    """No source had a model's bytes, or only damaged ones."""

    reason, grpc_status, http_status = Reason.FETCH_FAILED, "DATA_LOSS", 502


class DiskFull(MacpipeError):
    """A disk rejects a write: it is full, over its quota, or fails. The sentence says which."""

    reason, grpc_status, http_status = Reason.DISK_FULL, "RESOURCE_EXHAUSTED", 507


class PrefixMissing(MacpipeError):
    """A prefix is not on this worker's disk, not completely, or is damaged."""

    reason, grpc_status, http_status = Reason.PREFIX_MISSING, "NOT_FOUND", 404


class NoPlan(MacpipeError):
    """The layers cannot be placed on these workers as requested."""

    reason, grpc_status, http_status = Reason.NO_PLAN, "FAILED_PRECONDITION", 503


class DoesNotFit(NoPlan):
    """There is not enough memory; the sentence says how many GiB are missing."""

    reason, grpc_status = Reason.DOES_NOT_FIT, "RESOURCE_EXHAUSTED"


class ModelTooLarge(DoesNotFit):
    """A model fits on no Macs that there are, or not beside what is pinned: a request that is sent again fails again.

    That changes when a Mac joins, or when the operator unloads what is pinned.
    """

    reason, grpc_status, http_status = Reason.MODEL_TOO_LARGE, "FAILED_PRECONDITION", 400


class NoWorkers(MacpipeError):
    """Fewer workers answered than were requested."""

    reason, grpc_status, http_status = Reason.NO_WORKERS, "UNAVAILABLE", 503


class DuplicateName(MacpipeError):
    """Two workers of one cluster have the same name."""

    reason, grpc_status, http_status = Reason.DUPLICATE_NAME, "FAILED_PRECONDITION", 503


class DuplicateId(MacpipeError):
    """Two running coordinators, or two workers, have the same id: one's state folder is a copy of the other's."""

    reason, grpc_status, http_status = Reason.DUPLICATE_ID, "FAILED_PRECONDITION", 503


class VersionMismatch(MacpipeError):
    """A worker runs another version of macpipe or of mlx-lm."""

    reason, grpc_status, http_status = Reason.VERSION_MISMATCH, "FAILED_PRECONDITION", 503


class WorkerLost(MacpipeError):
    """A stage left or stopped answering; the sentence names the worker."""

    reason, grpc_status, http_status = Reason.WORKER_LOST, "UNAVAILABLE", 503


class WorkerRefused(WorkerLost):
    """The worker's machine refuses the connection: its process has ended."""

    reason = Reason.WORKER_REFUSED


class WorkerReplaced(WorkerLost):
    """Another worker of the cluster answers at this one's address."""

    reason = Reason.WORKER_REPLACED


class FrameOverdue(WorkerLost):
    """A frame did not return within its deadline: one of the stages hangs."""

    reason = Reason.FRAME_OVERDUE


class WorkerTaken(MacpipeError):
    """A worker serves another coordinator."""

    reason, grpc_status, http_status = Reason.WORKER_TAKEN, "FAILED_PRECONDITION", 503


class StageFailed(MacpipeError):
    """A stage reported that it could not do a step."""

    reason, grpc_status, http_status = Reason.STAGE_FAILED, "INTERNAL", 500


class RankFailed(StageFailed):
    """A rank of a group could not do a step, so it no longer is where the others are: the group is lost."""

    reason = Reason.RANK_FAILED


class InsecureGroup(MacpipeError):
    """Workers would exchange parts of activations over links that are neither authenticated nor encrypted."""

    reason, grpc_status, http_status = Reason.INSECURE_GROUP, "FAILED_PRECONDITION", 400


class NotServing(MacpipeError):
    """No model is loaded yet."""

    reason, grpc_status, http_status = Reason.NOT_SERVING, "UNAVAILABLE", 503


class LoadEnded(NotServing):
    """Somebody unloaded the model while it was being loaded."""

    reason = Reason.LOAD_ENDED


class Unreachable(MacpipeError):
    """There is no answer from an address."""

    reason, grpc_status, http_status = Reason.UNREACHABLE, "UNAVAILABLE", 503


class PortClosed(Unreachable):
    """No process listens at the address any more."""

    reason = Reason.PORT_CLOSED


class ConnectionLost(Unreachable):
    """A connection broke during a call, which may have been carried out."""

    reason = Reason.CONNECTION_LOST


class LinkFailed(MacpipeError):
    """A stage cannot reach the previous one; the coordinator relays that hop instead."""

    reason, grpc_status, http_status = Reason.LINK_FAILED, "FAILED_PRECONDITION", 503


class PortInUse(MacpipeError):
    """Another program listens on the address."""

    reason, grpc_status, http_status = Reason.PORT_IN_USE, "FAILED_PRECONDITION", 503


class Busy(MacpipeError):
    """The queue is full; ``retry_after_s`` says when to try again."""

    reason, grpc_status, http_status = Reason.BUSY, "RESOURCE_EXHAUSTED", 429


class LimitReached(MacpipeError):
    """An API key has reached a limit; the sentence has the figures, ``retry_after_s`` the time until it may go on."""

    reason, grpc_status, http_status = Reason.LIMIT_REACHED, "RESOURCE_EXHAUSTED", 429


class SlowReader(MacpipeError):
    """A client left too many token events unread."""

    reason, grpc_status, http_status = Reason.SLOW_READER, "RESOURCE_EXHAUSTED", 429


class OtherParty(Unreachable):
    """The peer at the address is a member of the cluster, but another one than expected."""

    reason = Reason.OTHER_PARTY


class DeadlineExceeded(MacpipeError):
    """The request's own deadline passed."""

    reason, grpc_status, http_status = Reason.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", 408


class Aborted(MacpipeError):
    """The request was cancelled: its client disconnected, or called Abort."""

    reason, grpc_status, http_status = Reason.ABORTED, "CANCELLED", 499


class RequestNotFound(MacpipeError):
    """No live request has this id."""

    reason, grpc_status, http_status = Reason.REQUEST_NOT_FOUND, "NOT_FOUND", 404


class AnswerLost(MacpipeError):
    """An answer of an earlier leader cannot go on, since this one does not have it. The request can be sent again."""

    reason, grpc_status, http_status = Reason.ANSWER_LOST, "UNAVAILABLE", 503


class AnswerDiffers(MacpipeError):
    """An answer cannot be continued where its reader is: the reader has other tokens than the answer."""

    reason, grpc_status, http_status = Reason.ANSWER_DIFFERS, "FAILED_PRECONDITION", 409


class RequestEnded(MacpipeError):
    """A request that is resumed has ended, and its answer is not kept any more."""

    reason, grpc_status, http_status = Reason.REQUEST_ENDED, "FAILED_PRECONDITION", 409


class BadFrame(MacpipeError):
    """Bytes from a peer are not a frame, or exceed a limit."""

    reason, grpc_status, http_status = Reason.BAD_FRAME, "INVALID_ARGUMENT", 400


class StaleEpoch(MacpipeError):
    """A frame or stream belongs to another epoch than the loaded one."""

    reason, grpc_status, http_status = Reason.STALE_EPOCH, "FAILED_PRECONDITION", 409


class StaleTerm(MacpipeError):
    """A coordinator's call is of another term than the one that the worker has granted."""

    reason, grpc_status, http_status = Reason.STALE_TERM, "FAILED_PRECONDITION", 409


class NotLeader(MacpipeError):
    """The coordinator does not lead (any more). ``details["leader"]`` has the gRPC addresses of who does, by commas."""

    reason, grpc_status, http_status = Reason.NOT_LEADER, "UNAVAILABLE", 503
