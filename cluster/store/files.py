"""Which files of a model count, and what is said of one: nothing here reads or fetches."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass

from cluster.model.checkpoint import FETCHED, WEIGHTS

RECORDS = ".macpipe"
"""The folder inside a partial checkpoint where its records are."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a model. ``sha256`` is the hub's word for the whole file, ``blob`` git's; empty where it has none."""

    name: str
    size: int
    sha256: str = ""
    blob: str = ""

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


def wanted(name: str) -> bool:
    """Whether a file is one that a model is served from. Names with a folder in them never are."""
    return "/" not in name and "\\" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in FETCHED)


def git_blob(content: bytes) -> str:
    """Git's name for a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
