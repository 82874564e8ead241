"""Measure how fast groups of workers add up. Rank 0 keeps the result, with the links that it has measured.

It starts an engine on each Mac of the group, which takes a few seconds, so only a load does it, and once a day. All
else uses what is kept.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

from cluster.coordinator.concurrent_calls import call_for_each
from cluster.coordinator.group_meeting import GroupMeeting
from cluster.coordinator.worker_client import WorkerClient
from cluster.coordinator.worker_messages import SumSeat
from cluster.core.all_reduce import AllReduce
from cluster.core.errors import MacpipeError
from cluster.core.process_groups import GroupPort
from cluster.core.text import parse_address
from cluster.core.worker import WorkerInfo
from cluster.placement.groups import group_name
from cluster.platform.process import first_error

__all__ = ["find_sums", "measure_sums"]

MEETING_BITS = 60
"""Of a random number, which no epoch has: those are milliseconds."""
log = logging.getLogger(__name__)


async def find_sums(members: Sequence[WorkerInfo], controls: Sequence[WorkerClient]) -> AllReduce | None:
    """Return what rank 0 has kept of a group; None if nothing, or if it does not answer."""
    seat = SumSeat(_kept_name(members), 0, len(members))
    try:
        return await _take_seat(seat, controls[0], None)
    except MacpipeError as e:
        log.info("sums: not known reason=%s group=%s", e.sentence, group_name([one.name for one in members]))
        return None


async def measure_sums(
    members: Sequence[WorkerInfo], controls: Sequence[WorkerClient], *, insecure: bool
) -> AllReduce | None:
    """Measure a group. Return None if that fails: an estimate will do.

    Its workers have granted this coordinator a term. ``insecure``: its links need be neither authenticated nor
    encrypted.
    """
    names = tuple(one.name for one in members)
    meeting = GroupMeeting(tuple(members), insecure, 1 + secrets.randbits(MEETING_BITS))
    seats = [SumSeat(_kept_name(members), rank, len(members)) for rank in range(len(members))]
    found: list[AllReduce | None] = [None]
    try:
        found = await call_for_each(lambda one: _take_seat(*one, meeting), list(zip(seats, controls, strict=True)))
    except* MacpipeError as errors:
        log.warning("sums: not measured reason=%s group=%s", first_error(errors).sentence, group_name(names))
    if found[0]:
        figures = found[0].seconds * 1e6, found[0].bandwidth / 1e6, found[0].is_disturbed
        log.info("sums: measured us=%.0f megabytes_per_s=%.0f disturbed=%s group=%s", *figures, group_name(names))
    return found[0]


async def _take_seat(seat: SumSeat, control: WorkerClient, meeting: GroupMeeting | None) -> AllReduce | None:
    """Return what one rank has measured; without a ``meeting``, what it has kept."""
    found = None
    async for answer in control.measure_sums(seat, meeting.number if meeting else 0):
        if isinstance(answer, AllReduce):
            found = answer
        elif meeting and isinstance(answer, GroupPort):
            await meeting.attend(seat.rank, control, answer)
    return found


def _kept_name(members: Sequence[WorkerInfo]) -> str:
    """Return what names a group where its sums are kept: its workers, what they compute with, and where they are."""
    return " ".join(f"{one.backend}:{one.id}@{parse_address(one.control_address)[0]}" for one in members)
