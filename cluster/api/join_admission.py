"""Admit Macs while this coordinator holds the cluster's authority, which may move to its Mac or away."""

from __future__ import annotations

import logging

import anyio
from anyio.abc import TaskStatus

from cluster.coordinator.reporter import Reporter
from cluster.coordinator.settings import ServeSettings
from cluster.core.errors import MacpipeError, PortInUse, Reason
from cluster.core.limits import JOIN_RETRY_S
from cluster.joining.join_port import EVERYWHERE, admit_macs
from cluster.security.authority import find_holder
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import DEFAULT_JOIN_PORT
from cluster.security.trust import Trust

log = logging.getLogger(__name__)


async def admit_while_holder(
    settings: ServeSettings, trust: Trust, report: Reporter, *, task_status: TaskStatus[None]
) -> None:
    """Open the join port whenever this Mac holds the authority, until cancelled.

    It has started once the port is open, if it is to be. Until then it raises ``PortInUse`` if the user asked for the
    port. While `macpipe init` or another program uses the default one, it tries again.
    """
    folder = ClusterFolder(settings.home, settings.cluster)
    host = settings.host or EVERYWHERE
    port = DEFAULT_JOIN_PORT if settings.join_port is None else settings.join_port
    started = False
    problem: Reason | None = None
    while True:
        try:
            while _holds_authority(folder, trust):
                async with admit_macs(folder, host, port):
                    if not started:
                        task_status.started()
                    started, problem = True, None
                    while _holds_authority(folder, trust):  # noqa: ASYNC110  # it is read from files
                        await anyio.sleep(JOIN_RETRY_S)
                log.info("join: closed, the authority was moved")
        except MacpipeError as e:
            if not started and not (isinstance(e, PortInUse) and settings.join_port is None):
                raise
            if e.reason is not problem:
                problem = e.reason
                report.problem(f"no Mac can join until this is mended: {e.sentence}")
        if not started:
            task_status.started()
            started = True
        await anyio.sleep(JOIN_RETRY_S)


def _holds_authority(folder: ClusterFolder, trust: Trust) -> bool:
    return folder.holds_authority and find_holder(folder, trust.members).here
