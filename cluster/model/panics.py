"""Panics of Rust libraries as ordinary errors.

pyo3 raises a panic as ``PanicException``, which is no ``Exception``: handlers of errors let it pass, and it ends
threads that have to go on. Its text may repeat what the library was given, so it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_panic", "panics_raised_as"]


def is_panic(error: BaseException) -> bool:
    """Tell whether ``error`` is a panic. Each library has a class of its own for them, and none exports it."""
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


@contextmanager
def panics_raised_as(error: Exception) -> Iterator[None]:
    """Raise ``error`` where the body panics."""
    try:
        yield
    except BaseException as raised:
        if is_panic(raised):
            raise error from None
        raise
