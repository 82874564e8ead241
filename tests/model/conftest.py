"""Checkpoints that the model tests share; each is created on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from checkpoints import make
from cluster.core.plan import ModelShape
from cluster.model.model_shape import read_shape


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> the folder of its tiny checkpoint, six layers deep. Tests must not change it."""
    return cache(lambda arch: make(arch, tmp_path_factory.mktemp(arch), layers=6))


@pytest.fixture(scope="session")
def shape(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelShape]:
    """Architecture -> its survey."""
    return cache(lambda arch: read_shape(checkpoint(arch), arch, None))
