"""The amount of a test's work: a sample in the default run, all of it with ``--all``, least with ``--quick``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

T = TypeVar("T")

LEAST = "least"
"""The profile that conftest loads with ``--quick``."""
SAMPLE = "sample"
"""The profile that conftest loads for the default run."""
WHOLE = "whole"
"""The profile that conftest loads with ``--all``."""


def effort(sample: int, whole: int, least: int | None = None) -> int:
    """Return ``sample``, ``whole`` in a run with ``--all``, or ``least``, if given, in one with ``--quick``.

    Call it when a test module is imported, or later.
    """
    profile = settings.get_current_profile_name()
    if profile == LEAST and least is not None:
        return least
    return whole if profile == WHOLE else sample


def chosen(values: Iterable[T], *sample: T) -> list[ParameterSet | T]:
    """Return ``values`` as a test's parameters; those that are not in ``sample`` run only with ``--all``."""
    known = list(values)
    assert all(one in known for one in sample), f"not among {known}"
    return [one if one in sample else _rare(one) for one in known]


def _rare(one: object) -> ParameterSet:
    return pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.long)
