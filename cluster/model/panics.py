"""Turns panics of Rust libraries into ordinary errors.

pyo3 raises a panic as ``PanicException``, which is not an ``Exception``: error handlers do not catch it, and it ends
threads that must keep running. Its text is dropped, since it may repeat the library's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_panic", "panics_raised_as"]


def is_panic(error: BaseException) -> bool:
    """Return whether ``error`` is a panic. Each library has its own class for panics and does not export it."""
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


@contextmanager
def panics_raised_as(error: Exception) -> Iterator[None]:
    """Raise ``error`` if the body panics."""
    try:
        yield
    except BaseException as raised:
        if is_panic(raised):
            raise error from None
        raise
