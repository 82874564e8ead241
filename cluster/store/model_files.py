"""Which files of a model count, and what is said of one: nothing here reads or fetches."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass

from cluster.model.checkpoint import FETCHED, WEIGHTS

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a model. ``sha256`` is the hub's word for the whole file, ``blob`` git's; empty where it has none.

    ``edition`` is a weight file's (see ``cluster.model.weight_versions``).
    """

    name: str
    size: int
    sha256: str = ""
    blob: str = ""
    edition: str = ""

    @property
    def weights(self) -> bool:
        return fnmatch.fnmatchcase(self.name, WEIGHTS)

    def matches(self, content: bytes) -> bool:
        """Whether this can be the file's content."""
        if len(content) != self.size:
            return False
        if self.sha256:
            return hashlib.sha256(content).hexdigest() == self.sha256
        return not self.blob or git_blob(content) == self.blob


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model, and where on the hub it is (empty: it is not from there)."""

    files: tuple[StoredFile, ...]
    repo: str = ""
    commit: str = ""


def origin_of(noted: object) -> ModelFiles:
    """What was noted of a model as plain data, checked. Raises ValueError."""
    match noted:
        case {"files": [*files], "repo": str(repo), "commit": str(commit)}:
            return ModelFiles(tuple(map(_stored_file, files)), repo, commit)
    raise ValueError("no record of a model's files")


def _stored_file(noted: object) -> StoredFile:
    match noted:
        case {
            "name": str(name),
            "size": int(size),
            "sha256": str(sha256),
            "blob": str(blob),
            "edition": str(edition),
        } if is_wanted(name) and size >= 0:
            return StoredFile(name, size, sha256, blob, edition)
    raise ValueError("no record of a file")


def is_wanted(name: str) -> bool:
    """Whether a file is one that a model is served from: no name with a folder in it, hidden, or odd ever is."""
    return bool(_PLAIN.fullmatch(name)) and any(fnmatch.fnmatchcase(name, pattern) for pattern in FETCHED)


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 in hex, as a fingerprint is."""
    return bool(_DIGEST.fullmatch(text))


def git_blob(content: bytes) -> str:
    """Git's name for a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
