"""Tests of one group share a process: otherwise each process starts the group's daemons, which doubles the time."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("grouped")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process")
def test_a_group_is_known_to_whoever_hands_out_tests(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@grouped"), "this pytest and this pytest-xdist do not go together"
