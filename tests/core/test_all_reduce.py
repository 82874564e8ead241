"""The time of a sum, from two that were measured."""

from __future__ import annotations

import pytest

from cluster.core.all_reduce import FEW_BYTES, MANY_BYTES, AllReduce, SumSource


def test_a_sum_takes_longer_only_beyond_the_bytes_that_were_measured() -> None:
    found = AllReduce.between(50e-6, 2e-3)
    assert found.source is SumSource.MEASURED
    assert found.seconds_of(1024) == found.seconds_of(FEW_BYTES) == 50e-6
    assert found.seconds_of(MANY_BYTES) == pytest.approx(2e-3)
    assert AllReduce.between(50e-6, 40e-6).is_possible, "noise may have turned them round"
    assert not AllReduce.measured(float("nan"), 1e9).is_possible
