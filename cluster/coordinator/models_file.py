"""The file that names the models of a coordinator, and notice when it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster.coordinator.settings import ModelEntry
from cluster.core.errors import InvalidOption
from cluster.platform.private_files import open_regular_file

MAX_BYTES: Final = 2**20


@dataclass(slots=True)
class ModelsFile:
    """A file of models. ``parse`` makes entries of its text, or raises InvalidOption."""

    path: Path
    parse: Callable[[str], tuple[ModelEntry, ...]]
    _digest: bytes = field(default=b"", init=False)

    def read(self) -> tuple[ModelEntry, ...]:
        """Return the models of the file. Raises InvalidOption if it cannot be read or is wrong."""
        return self.parse(self.read_text())

    def read_text(self) -> str:
        """Return the file's text. Raises InvalidOption if it cannot be read."""
        content = self._content()
        self._digest = hashlib.sha256(content).digest()
        try:
            return content.decode()
        except UnicodeDecodeError as e:
            line = content.count(b"\n", 0, e.start) + 1
            raise InvalidOption(f"{self.path}:{line}: not UTF-8; save the file in that encoding") from None

    def read_changed(self) -> tuple[ModelEntry, ...] | None:
        """Return the models if the file's content is another than at the last call or ``read``; None if it is not.

        Raises InvalidOption as ``read``, once for each content.
        """
        try:
            content = self._content()
        except InvalidOption as e:
            digest = hashlib.sha256(e.sentence.encode()).digest()
            if digest == self._digest:
                return None
            self._digest = digest
            raise
        return None if hashlib.sha256(content).digest() == self._digest else self.read()

    def _content(self) -> bytes:
        try:
            with open_regular_file(self.path.expanduser().resolve()) as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as e:
            raise InvalidOption(f"cannot read {self.path}: {e.strerror}; give a readable file to --models") from None
        if len(content) > MAX_BYTES:
            raise InvalidOption(f"{self.path} has more than {MAX_BYTES} bytes; give a smaller file to --models")
        return content
