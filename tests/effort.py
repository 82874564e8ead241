"""The amount of a test's work: a sample in the default run, all of it with ``--all``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

T = TypeVar("T")

QUICK = "quick"
"""The profile that conftest loads for the default run."""
WHOLE = "whole"
"""The profile that conftest loads with ``--all``."""


def effort(quick: int, whole: int) -> int:
    """Return ``quick``, or ``whole`` in a run with ``--all``. Call it when a test module is imported, or later."""
    return quick if settings.get_current_profile_name() == QUICK else whole


def chosen(values: Iterable[T], *quick: T) -> list[ParameterSet | T]:
    """Return ``values`` as a test's parameters; those that are not ``quick`` run only with ``--all``."""
    known = list(values)
    assert all(one in known for one in quick), f"not among {known}"
    return [one if one in quick else _rare(one) for one in known]


def _rare(one: object) -> ParameterSet:
    return pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.long)
