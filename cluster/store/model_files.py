"""Descriptions of a model's files, and which files belong to a model. Reads and fetches nothing."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass

from cluster.core.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cluster.model.checkpoint import FETCHED, WEIGHTS
from cluster.model.sentence_embedding import POOLING

ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a model.

    ``sha256`` is the hub's hash of the whole file, ``blob`` its git blob id; each is empty if the hub gives none.
    ``edition`` is the version of a weight file (see ``cluster.model.weight_versions``).
    """

    name: str
    size: int
    sha256: str = ""
    blob: str = ""
    edition: str = ""

    @property
    def weights(self) -> bool:
        return self.name == ADAPTER_WEIGHTS or fnmatch.fnmatchcase(self.name, WEIGHTS)

    def matches(self, content: bytes) -> bool:
        """Return whether ``content`` has the file's size and hash."""
        if len(content) != self.size:
            return False
        if self.sha256:
            return hashlib.sha256(content).hexdigest() == self.sha256
        return not self.blob or git_blob(content) == self.blob


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model, and its repository and commit on the hub (empty if it is not from the hub)."""

    files: tuple[StoredFile, ...]
    repo: str = ""
    commit: str = ""


def origin_of(noted: object) -> ModelFiles:
    """Decode and check a model's record from plain data. Raise ValueError if it is invalid."""
    match noted:
        case {"files": [*files], "repo": str(repo), "commit": str(commit)}:
            return ModelFiles(tuple(map(_stored_file, files)), repo, commit)
    raise ValueError("invalid record of a model's files")


def _stored_file(noted: object) -> StoredFile:
    match noted:
        case {
            "name": str(name),
            "size": int(size),
            "sha256": str(sha256),
            "blob": str(blob),
            "edition": str(edition),
        } if is_stored(name) and size >= 0:
            return StoredFile(name, size, sha256, blob, edition)
    raise ValueError("invalid record of a file")


def is_wanted(name: str) -> bool:
    """Return whether a file belongs to a model.

    Names that are hidden or contain a folder or odd characters do not, except that of the pooling's config.
    """
    plain = bool(_PLAIN.fullmatch(name)) and any(fnmatch.fnmatchcase(name, pattern) for pattern in FETCHED)
    return plain or name == POOLING


def is_stored(name: str) -> bool:
    """Return whether a file belongs to a model or to an adapter."""
    return is_wanted(name) or name in ADAPTER_FILES


def is_digest(text: str) -> bool:
    """Return whether ``text`` is a SHA-256 in lower-case hex, as fingerprints are."""
    return bool(_DIGEST.fullmatch(text))


def git_blob(content: bytes) -> str:
    """Return the git blob id of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
