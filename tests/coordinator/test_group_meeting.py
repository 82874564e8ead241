"""In which order the ranks of a group are told of each other."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from cluster.coordinator import group_meeting
from cluster.coordinator.group_meeting import GroupMeeting
from cluster.core.errors import WorkerLost

pytestmark = pytest.mark.anyio
NAMES = ("ada", "bob", "cyd")
HOSTS = ["127.0.0.1:7000", "127.0.0.1:7001", "127.0.0.1:7002"]


class Control:
    """Stands in for the client of a worker, which begins to meet the others after ``begins_s``."""

    address = "127.0.0.1:7700"

    def __init__(self, rank: int, begun: list[int], begins_s: float = 0.0) -> None:
        self.rank, self.begun, self.begins_s = rank, begun, begins_s

    async def join_group(self, epoch: int, hosts: Sequence[str], backend: str, *, insecure: bool) -> None:
        assert (epoch, list(hosts), backend, insecure) == (5, HOSTS, "ring", False)
        await anyio.sleep(self.begins_s)
        self.begun.append(self.rank)


async def test_the_last_rank_begins_once_all_others_have_begun() -> None:
    """It connects first, to one that must listen: MLX tries again only after seconds."""
    meeting, begun = GroupMeeting(NAMES, "ring", insecure=False, number=5), list[int]()
    async with anyio.create_task_group() as tasks:
        for rank, begins_s in ((2, 0.0), (0, 0.2), (1, 0.1)):
            tasks.start_soon(meeting.attend, rank, Control(rank, begun, begins_s), 7000 + rank)
    assert begun == [1, 0, 2]


async def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_meeting, "GROUP_GATHER_S", 0.01)
    meeting = GroupMeeting(NAMES, "ring", insecure=False, number=5)
    with pytest.raises(WorkerLost, match="worker ada did not come to the group ada"):
        await meeting.attend(2, Control(2, []), 7002)  # type: ignore[arg-type]
