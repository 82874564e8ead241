"""Reads models from the Hugging Face Hub, through huggingface_hub's own session.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as they do in huggingface_hub. This module lists a model's files, reads
ranges of them, and turns each refusal into an error that says what to do. It stores nothing, and it never requests more
than it was asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them without saying so
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from cluster.core.errors import (
    BadCheckpoint,
    FetchFailed,
    HubOffline,
    HubUnreachable,
    MacpipeError,
    ModelForbidden,
    ModelNotFound,
)
from cluster.core.limits import MAX_SAFETENSORS_HEADER_BYTES, MAX_SMALL_FILE_BYTES
from cluster.store.limits import HUB_PEEK_BYTES, HUB_TIMEOUT_S, MAX_MODEL_FILES
from cluster.store.model_files import ModelFiles, StoredFile, is_wanted

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every range request at INFO


@dataclass(frozen=True, slots=True)
class HubName:
    """``owner/name`` or ``owner/name@revision``."""

    repo: str
    revision: str = "main"

    @classmethod
    def parse(cls, name: str) -> HubName:
        repo, _, revision = name.partition("@")
        return cls(repo, revision or "main")

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def look_up(name: HubName) -> ModelFiles:
    """Return the current files of a model on the hub. Raise as ``hub_failures`` does."""
    with hub_failures(name):
        info = _model_info(name)
    siblings = sorted(info.siblings or (), key=lambda one: one.rfilename)
    if len(siblings) > MAX_MODEL_FILES:
        raise BadCheckpoint(f"{name} has {len(siblings)} files on the hub; at most {MAX_MODEL_FILES} are supported")
    commit = info.sha or name.revision
    files = tuple(_stored_file(one, commit) for one in siblings if is_wanted(one.rfilename))
    _require_model(name, [one.rfilename for one in siblings], files)
    return ModelFiles(files, name.repo, commit)


def _stored_file(one: RepoSibling, commit: str) -> StoredFile:
    sha256 = one.lfs.sha256 if one.lfs else ""
    blob = one.blob_id or ""
    return StoredFile(one.rfilename, one.size or 0, sha256, blob, edition=sha256 or blob or commit)


def _model_info(name: HubName) -> ModelInfo:
    """Return the hub's description of a model. Raise HubUnreachable if the answer is not one."""
    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
        valid = all(_is_valid(one) for one in info.siblings or ()) and isinstance(info.sha or "", str)
    except (HFValidationError, OfflineModeIsEnabled):
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:  # the answer came from another service or from a proxy
        raise _not_a_hub(name) from error
    if not valid:
        raise _not_a_hub(name)
    return info


def _is_valid(one: RepoSibling) -> bool:
    numbers = [size for size in (one.size, one.lfs.size if one.lfs else None) if size is not None]
    texts = [one.rfilename, one.blob_id or "", one.lfs.sha256 if one.lfs else ""]
    return all(type(n) is int and 0 <= n < 2**63 for n in numbers) and all(isinstance(text, str) for text in texts)


def _not_a_hub(name: HubName) -> HubUnreachable:
    return HubUnreachable(
        f"the server at {constants.ENDPOINT} is not a Hugging Face hub: its answer for {name} does not describe a "
        "model; check HF_ENDPOINT and this Mac's network"
    )


def _require_model(name: HubName, all_names: list[str], files: tuple[StoredFile, ...]) -> None:
    if "config.json" not in {file.name for file in files}:
        raise ModelNotFound(
            f"{name} on the hub has no config.json, so mlx-lm cannot load it; choose an MLX conversion of the model"
        )
    if not any(file.weights for file in files):
        pickles = [one for one in all_names if one.endswith((".bin", ".pt", ".pth"))]
        raise BadCheckpoint(
            f"{name} has its weights only in pickle files ({pickles[0]}), which can run code when they are read; "
            "use a safetensors version of the model"
            if pickles
            else f"{name} on the hub has no weights: it has no file named model*.safetensors; choose another conversion"
        )
    for file in files:
        if not file.weights and file.size > MAX_SMALL_FILE_BYTES:
            raise BadCheckpoint(
                f"{file.name} of {name} is too large: it has {file.size} bytes, and a file other than weights may have "
                f"at most {MAX_SMALL_FILE_BYTES}"
            )


class Hub:
    """A source of byte ranges: one model on the hub at one commit."""

    label = "the hub"

    def __init__(self, repo: str, commit: str) -> None:
        self._name = HubName(repo, commit)

    def read(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes ``start .. end - 1`` of a file, in pieces.

        Raise FetchFailed if the answer is too short or too long, and as ``hub_failures`` does.
        """
        url = hf_hub_url(self._name.repo, file, revision=self._name.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        left = end - start
        with (
            hub_failures(self._name),
            http_stream_backoff("GET", url, headers=headers, timeout=HUB_TIMEOUT_S, retry_on_exceptions=()) as answer,
        ):
            hf_raise_for_status(answer)
            if answer.status_code != httpx2.codes.PARTIAL_CONTENT and (start or left < _length(answer)):
                raise FetchFailed(
                    f"{constants.ENDPOINT} does not support range requests, which macpipe needs; set HF_ENDPOINT to"
                    " another mirror, or unset it"
                )
            for data in answer.iter_bytes():
                left -= len(data)
                if left < 0:
                    raise FetchFailed(f"{constants.ENDPOINT} sent more bytes of {file} than requested")
                yield data
        if left:
            raise FetchFailed(
                f"{constants.ENDPOINT} sent {left} bytes too few of {file}; try again, it continues from there"
            )

    def small(self, file: StoredFile) -> bytes:
        """Return a small file, or the length field and header of a safetensors file. Raise as ``read`` does."""
        if not file.weights:
            return b"".join(self.read(file.name, 0, file.size)) if file.size else b""
        return self._header(file)

    def _header(self, file: StoredFile) -> bytes:
        first = HUB_PEEK_BYTES if file.size >= 64 * HUB_PEEK_BYTES else min(8, file.size)
        head = b"".join(self.read(file.name, 0, first)) if first else b""
        length = 8 + int.from_bytes(head[:8], "little")
        if length > min(MAX_SAFETENSORS_HEADER_BYTES, file.size):
            raise BadCheckpoint(
                f"the header of {file.name} on the hub is damaged; choose another conversion of the model",
                file=file.name,
            )
        return head[:length] if length <= first else head + b"".join(self.read(file.name, first, length))


def _length(answer: httpx2.Response) -> int:
    return int(answer.headers.get("Content-Length") or 0)


@contextmanager
def hub_failures(name: HubName) -> Iterator[None]:
    """Translate huggingface_hub's errors into macpipe's, each with a remedy.

    Raise ModelForbidden, ModelNotFound, BadCheckpoint, HubOffline, HubUnreachable or FetchFailed.
    """
    try:
        yield
    except MacpipeError:
        raise
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError) as error:
        raise _refusal(name, error) from error
    except OfflineModeIsEnabled as error:
        raise HubOffline(
            f"{name} is not completely on these Macs, and HF_HUB_OFFLINE forbids fetching the rest; unset it and try "
            "again while online, after which the model also works offline"
        ) from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
        raise HubUnreachable(
            f"the hub's address {constants.ENDPOINT!r} is not a valid URL ({_cause(error)}): set HF_ENDPOINT to a URL "
            "that begins with https://, or unset it"
        ) from error
    except (httpx2.HTTPError, OSError) as error:
        raise HubUnreachable(
            f"cannot reach {constants.ENDPOINT} for {name} ({_cause(error)}). Check this Mac's network and "
            "HF_ENDPOINT; the next fetch continues from what is on disk"
        ) from error


def _refusal(name: HubName, error: Exception) -> MacpipeError:
    endpoint = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        return _gated_error(name)
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"{name.repo} has no revision {name.revision} on {endpoint}; name one as OWNER/NAME@REVISION"
        )
    if isinstance(error, HFValidationError):
        return ModelNotFound(f"{str(name)!r} is neither a folder nor a Hugging Face id (owner/name)")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(
            f"there is no model {name.repo} on {endpoint}, or it is private and this Mac's HF_TOKEN has no access; "
            "check the name, and set HF_TOKEN if the model is private"
        )
    if status == httpx2.codes.UNAUTHORIZED and get_token():
        return ModelForbidden(
            f"{endpoint} rejects the token of this Mac: HF_TOKEN, or the token that `hf auth login` saved, is invalid "
            f"or has expired. Set a valid token, or unset it if {name} is public"
        )
    if status in (401, 403):
        return ModelForbidden(
            f"{endpoint} denies access to {name} ({status}); check HF_TOKEN, and that its account may read the model"
        )
    if isinstance(error, EntryNotFoundError):
        return BadCheckpoint(f"a file of {name} no longer exists on {endpoint}: {_cause(error)}")
    return HubUnreachable(f"{endpoint} answers {status or 'with an error'} for {name}; try again later")


def _gated_error(name: HubName) -> ModelForbidden:
    ask = f"ask for access on {constants.ENDPOINT}/{name.repo}"
    if get_token():
        return ModelForbidden(
            f"{name} is gated, and the token of this Mac (HF_TOKEN, or the one that `hf auth login` saved) has no "
            f"access: {ask} with the token's own account, or set HF_TOKEN to a token of an account that has access"
        )
    return ModelForbidden(
        f"{name} is gated: {ask}, and set HF_TOKEN to a token of that account (or run `hf auth login`) on every Mac"
    )


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
