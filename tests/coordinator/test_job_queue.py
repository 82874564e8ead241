"""The engine loop's inbox: jobs that will not run any more are refused, and nobody waits for them."""

from __future__ import annotations

import pytest

from cluster.coordinator.job_queue import JobQueue
from cluster.core.errors import NotServing


def test_what_is_asked_after_the_end_is_refused() -> None:
    jobs = JobQueue()
    early = jobs.ask(lambda: 7)
    assert jobs.put(lambda: None)
    jobs.close()
    late = jobs.ask(lambda: 8)
    assert not jobs.put(lambda: None)
    while job := jobs.get(0):
        job()
    assert early.result(0) == 7
    with pytest.raises(NotServing):
        late.result(0)
