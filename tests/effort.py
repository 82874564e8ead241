"""How much of a test's work to do: a sample in the quick run, all of it with ``--all``."""

from __future__ import annotations

from hypothesis import settings

QUICK = "quick"
"""The profile that conftest loads for the quick run."""


def effort(quick: int, whole: int) -> int:
    """``quick``, or ``whole`` where the run has ``--all``. To be asked when a test module is imported, or later."""
    return quick if settings.get_current_profile_name() == QUICK else whole
