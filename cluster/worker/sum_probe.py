"""Measure how fast a group that this worker is in adds up, with an engine that loads nothing, and keep the result.

It knows one rank. Which workers form a group, and whether a measurement is needed, the coordinator decides.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.codec.group_port import encode_rdma_ports
from cluster.core.all_reduce import AllReduce
from cluster.core.errors import BadFrame, Busy, InvalidRequest
from cluster.core.group_limits import MAX_GROUP_KEY_CHARS, SUMS_S
from cluster.v1 import worker_pb2 as pb
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.group_joins import GroupJoins
from cluster.worker.pipe_messages import MeasureSums, SumsMeasured
from cluster.worker.profile_file import ProfileFile
from cluster.worker.supervisor import Supervisor

__all__ = ["SumProbe"]


class SumProbe:
    """The measurements of one worker, one at a time. Lives on one event loop."""

    def __init__(self, slots: EngineSlots, joins: GroupJoins, file: ProfileFile) -> None:
        self._slots, self._joins, self._file = slots, joins, file
        self._measuring = False

    async def answer(self, request: pb.MeasureSumsRequest) -> AsyncGenerator[pb.MeasureSumsResponse, None]:
        """Yield what is kept of a group, or measure it as one of its ranks: first the engine's port, then the result.

        Raises ``Busy`` while another group is measured, ``WorkerLost`` if the ranks do not meet in time or are too
        slow, and ``InvalidRequest``.
        """
        if not 0 < len(request.group) <= MAX_GROUP_KEY_CHARS:
            raise InvalidRequest("a group to measure has no name, or one that is too long", field="group")
        if not request.ranks:
            yield _encode(self._file.sums(request.group))
            return
        if self._measuring:
            raise Busy("this worker measures another group; try again in a minute")
        self._measuring = True
        try:
            async with self._slots.lend_rank() as supervisor:
                joins = self._joins.join(supervisor, request.meeting, request.rank, request.ranks)
                async with aclosing(joins) as joining:
                    async for port in joining:
                        rdma_ports = encode_rdma_ports(port)
                        yield pb.MeasureSumsResponse(group_port=port.number, rdma_ports=rdma_ports)
                found = await _measure(supervisor)
        finally:
            self._measuring = False
        yield _encode(self._file.put_sums(request.group, found))


async def _measure(supervisor: Supervisor) -> AllReduce:
    answer = await supervisor.ask(MeasureSums, SUMS_S)
    if not isinstance(answer, SumsMeasured):
        raise BadFrame("the engine did not say how fast its group adds up")
    found = AllReduce.measured(answer.seconds, answer.bandwidth, disturbed=answer.disturbed)
    if not found.is_possible:
        raise BadFrame("the engine measured sums that take an impossible time")
    return found


def _encode(found: AllReduce | None) -> pb.MeasureSumsResponse:
    if found is None:
        return pb.MeasureSumsResponse()
    return pb.MeasureSumsResponse(seconds=found.seconds, bandwidth=found.bandwidth, disturbed=found.is_disturbed)
