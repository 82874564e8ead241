"""Changes what two modules of libraries do when they are imported.

``mlx_lm.utils`` sets this process's limit of open files to 2,048, and the hard limit to at most 4,096. Only root can
undo that, and the import fails if the limit is lower already. The command that starts a process decides how many files
it may open.

``transformers.utils.import_utils`` reads the files of all models, and remembers 128 folders of some 500. They are asked
for twice, so without a larger memory all are read twice: a fifth of the time that an engine takes to start. In each
file it looks for ``__all__`` line by line, for which it takes a tenth of that time; a search of the text is faster.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Final


def change_imports() -> None:
    """Change later imports of these modules."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def exported_part(text: str) -> str:
    """Return a Python file's text from its last line that begins with ``__all__``, or all of it if there is none."""
    return text[text.rfind("\n__all__") + 1 :]


class _KeepsLimits(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code while ``setrlimit`` does nothing."""
        with _unchangeable_limits():
            super().exec_module(module)


class _ReadsModelsFast(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code, then let it remember all folders and read the end of each file alone."""
        super().exec_module(module)
        if fetch := getattr(module, "fetch__all__", None):
            module.fetch__all__ = lambda text: fetch(exported_part(text))  # type: ignore[attr-defined]
        read = getattr(module, "create_import_structure_from_path", None)
        if unbounded := getattr(read, "__wrapped__", None):
            module.create_import_structure_from_path = cache(unbounded)  # type: ignore[attr-defined]


_LOADERS: Final = {"mlx_lm.utils": _KeepsLimits, "transformers.utils.import_utils": _ReadsModelsFast}


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for the modules in ``_LOADERS`` only."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _LOADERS else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LOADERS[fullname](spec.loader.name, spec.loader.path)
        return spec


@contextmanager
def _unchangeable_limits() -> Iterator[None]:
    original = resource.setrlimit
    resource.setrlimit = lambda resource, limits, /: None
    try:
        yield
    finally:
        resource.setrlimit = original
