"""Keeps mlx-lm from lowering this process's limit of open files.

``mlx_lm.utils`` sets it to 2,048, and at most 4,096, as it is imported. That cannot be undone without root, and the
import fails where the limit is lower already. How many files a process may open is for its own command to say.
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
    """From now on ``mlx_lm.utils`` leaves the limits as they are when it is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of ``mlx_lm.utils`` alone."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _LOWERS_LIMITS else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code without its say over limits."""
        with _unchangeable_limits():
            super().exec_module(module)


@contextmanager
def _unchangeable_limits() -> Iterator[None]:
    change = resource.setrlimit
    resource.setrlimit = lambda resource, limits, /: None
    try:
        yield
    finally:
        resource.setrlimit = change
