"""Prevents mlx-lm from lowering this process's limit of open files.

At import, ``mlx_lm.utils`` sets it to 2,048, and the hard limit to at most 4,096. Only root can undo that, and the
import fails if the limit is lower already. The command that starts a process decides how many files it may open.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Final

_LOWERS_LIMITS: Final = "mlx_lm.utils"


def keep_limits_on_import() -> None:
    """Make later imports of ``mlx_lm.utils`` leave the limits unchanged."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for ``mlx_lm.utils`` only."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _LOWERS_LIMITS else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code while ``setrlimit`` does nothing."""
        with _unchangeable_limits():
            super().exec_module(module)


@contextmanager
def _unchangeable_limits() -> Iterator[None]:
    original = resource.setrlimit
    resource.setrlimit = lambda resource, limits, /: None
    try:
        yield
    finally:
        resource.setrlimit = original
