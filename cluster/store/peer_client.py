"""The gRPC client of another Mac's store: lists what it has of a model and reads the bytes.

``store_server`` is the server. Answers are not trusted: this module checks names, and callers hash the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc

from cluster.core.errors import BadCheckpoint, FetchFailed
from cluster.core.limits import CONTROL_TIMEOUT_S, MAX_SAFETENSORS_HEADER_BYTES, MAX_SMALL_FILE_BYTES
from cluster.model.checkpoint import TensorInfo
from cluster.security.trust import WORKER, Trust
from cluster.store.limits import (
    FETCH_RANGE_BYTES,
    MAX_CHECKPOINT_TENSORS,
    MAX_MODEL_FILES,
    MAX_STORE_ANSWER_BYTES,
    MAX_TENSORS_NAMED,
    PEER_CALL_TIMEOUT_S,
)
from cluster.store.model_files import ModelFiles, StoredFile, is_stored
from cluster.transport.grpc_setup import store_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import store_pb2 as pb
from cluster.v1.store_pb2_grpc import StoreServiceStub


@dataclass(frozen=True, slots=True)
class Holdings:
    """A peer's tensors of one model, by name, and the digests that it knows."""

    here: frozenset[str] = frozenset()
    """Present, and not known to be damaged."""
    coming: frozenset[str] = frozenset()
    """Being fetched."""
    checking: frozenset[str] = frozenset()
    """Being hashed again, because their file changed on the peer's disk."""
    damaged: frozenset[str] = frozenset()
    """Found damaged."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 in hex by name."""


class Peer:
    """The store of the Mac ``name`` at ``address``, for one model. A context manager. Thread-safe.

    ``party`` is the identity that the server must prove (see ``cluster.security.trust``). If a call fails, raise the
    peer's own MacpipeError, or Unreachable.
    """

    def __init__(self, trust: Trust, name: str, address: str, fingerprint: str, party: str = WORKER) -> None:
        self.address, self.label, self._fingerprint = address, name, fingerprint
        self._channel = store_channel(trust, address, party, MAX_STORE_ANSWER_BYTES)
        self._stub = StoreServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def describe(self) -> ModelFiles:
        """Return the model's files. Raise BadCheckpoint if their names or number are not acceptable."""
        request = pb.DescribeModelRequest(fingerprint=self._fingerprint)
        with self._failures():
            answer = self._stub.DescribeModel(request, timeout=CONTROL_TIMEOUT_S)
        if (count := len(answer.files)) > MAX_MODEL_FILES:
            raise BadCheckpoint(f"{self.label} names {count} files of one model; at most {MAX_MODEL_FILES} are allowed")
        files = tuple(StoredFile(file.name, file.size, file.sha256, edition=file.edition) for file in answer.files)
        strange = [file.name for file in files if not is_stored(file.name)]
        if strange:
            raise BadCheckpoint(f"{self.label} offers {strange[0][:200]!r}, which is not a file of a model")
        return ModelFiles(files, answer.repo, answer.commit)

    def small(self, file: StoredFile) -> bytes:
        """Return a small file, or the length field and header of a safetensors file."""
        most = MAX_SAFETENSORS_HEADER_BYTES + 8 if file.weights else MAX_SMALL_FILE_BYTES
        request = pb.ReadFileRequest(fingerprint=self._fingerprint, file=file.name)
        content = bytearray()
        with self._failures():
            for part in self._stub.ReadFile(request, timeout=PEER_CALL_TIMEOUT_S):
                content += part.data
                if len(content) > most:
                    raise BadCheckpoint(f"{self.label} sent more than {most} bytes of {file.name}")
        return bytes(content)

    def holdings(self, names: Sequence[str], *, sources: bool = False) -> Holdings:
        """Return what the peer has now: of the tensors ``names``, or of all if there are too many for one request.

        With ``sources``, return the digests of what a quantized copy was made from, by the names of its model.
        """
        found: dict[int, set[str]] = {presence: set() for presence in pb.Presence.values()}
        digests: dict[str, str] = {}
        few = names if len(names) <= MAX_TENSORS_NAMED else ()
        request = pb.ListTensorsRequest(fingerprint=self._fingerprint, tensors=few, sources=sources)
        with self._failures():
            for part in self._stub.ListTensors(request, timeout=CONTROL_TIMEOUT_S):
                if len(part.tensors) > MAX_TENSORS_NAMED:
                    raise FetchFailed(f"{self.label} names more tensors at once than a message may have")
                for one in part.tensors:
                    found.setdefault(one.presence, set()).add(one.name)
                    if one.sha256:
                        digests[one.name] = one.sha256.hex()
                if len(digests) + sum(map(len, found.values())) > 2 * MAX_CHECKPOINT_TENSORS:
                    raise FetchFailed(f"{self.label} lists more tensors than a model may have")
        return Holdings(
            here=frozenset(found[pb.PRESENCE_HERE]),
            coming=frozenset(found[pb.PRESENCE_COMING]),
            checking=frozenset(found[pb.PRESENCE_CHECKING]),
            damaged=frozenset(found[pb.PRESENCE_DAMAGED]),
            digests=digests,
        )

    def read(self, tensors: tuple[TensorInfo, ...], offset: int, length: int) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``offset`` on of the concatenated tensors, in pieces."""
        names = [tensor.name for tensor in tensors]
        while length:
            piece = min(length, FETCH_RANGE_BYTES)
            request = pb.ReadTensorsRequest(fingerprint=self._fingerprint, tensors=names, offset=offset, length=piece)
            yield from self._piece(request, piece)
            offset, length = offset + piece, length - piece

    def _piece(self, request: pb.ReadTensorsRequest, left: int) -> Iterator[bytes]:
        call = self._stub.ReadTensors(request, timeout=PEER_CALL_TIMEOUT_S)
        try:
            with self._failures():
                for part in call:
                    left -= len(part.data)
                    if left < 0:
                        raise FetchFailed(f"{self.label} sent more bytes than requested")
                    yield part.data
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
        if left:
            raise FetchFailed(f"{self.label} sent {left} bytes too few")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address, peer="store") from error
