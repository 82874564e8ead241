"""Measurements of processes."""

from __future__ import annotations

import os

from cluster.platform.process import resident_bytes


def test_resident_memory_is_the_same_by_proc_and_by_ps() -> None:
    by_proc, by_ps = resident_bytes(os.getpid(), "linux"), resident_bytes(os.getpid(), "darwin")
    assert 0.5 < by_proc / by_ps < 2
    assert resident_bytes(2**22 + 1, "darwin") == resident_bytes(2**22 + 1, "linux") == 0
