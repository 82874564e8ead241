"""Which batches of records a standby has stored, as its leader counts them."""

from __future__ import annotations

import pytest

from cluster.coordinator import follower as module
from cluster.coordinator.follower import Follower
from cluster.core.leadership import CoordinatorName
from cluster.v1 import leader_pb2 as pb


@pytest.fixture
def follower() -> Follower:
    return Follower(CoordinatorName("mac-2", "b1"), "copy", lambda: 0.0)


def send(follower: Follower, batch: int) -> None:
    follower.put(pb.FollowResponse(records=b"record"))
    follower.reach(batch)


def test_a_batch_is_stored_once_its_last_update_is_acknowledged(follower: Follower) -> None:
    send(follower, 1)
    send(follower, 2)
    follower.acknowledge(1)
    assert follower.reached == 1
    follower.acknowledge(2)
    assert (follower.reached, follower.behind) == (2, 0)


def test_a_batch_without_records_is_stored_at_once(follower: Follower) -> None:
    follower.reach(3)
    assert follower.reached == 3


def test_a_batch_that_came_after_the_stream_ended_is_not_stored(follower: Follower) -> None:
    send(follower, 1)
    follower.acknowledge(1)
    follower.close()  # its stream has ended, but the leader has not left it out yet
    send(follower, 2)
    assert follower.reached == 1


def test_a_batch_that_a_slow_standby_was_not_sent_is_not_stored(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(follower, 1)
    monkeypatch.setattr(module, "MAX_UNSTORED_BYTES", 1)
    send(follower, 2)
    follower.acknowledge(1)
    assert follower.reached == 1
