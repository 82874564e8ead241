"""The links between workers, asked of those who receive. Every pair is measured at most once a day.

In round k each worker times the way from the one k places on, so nobody sends or receives twice at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import anyio

from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError
from cluster.core.plan import Link
from cluster.core.worker import WorkerInfo

log = logging.getLogger(__name__)


async def measure_links(workers: Sequence[WorkerInfo], controls: Sequence[WorkerClient]) -> dict[tuple[str, str], Link]:
    """By the names (from, to). A pair that cannot be measured is left out: the plan takes an ordinary link for it."""
    links: dict[tuple[str, str], Link] = {}
    for distance in range(1, len(workers)):
        async with anyio.create_task_group() as tasks:
            for i, (worker, control) in enumerate(zip(workers, controls, strict=True)):
                source = workers[(i + distance) % len(workers)]
                tasks.start_soon(_measure, source, worker, control, links)
    return links


async def _measure(
    source: WorkerInfo, worker: WorkerInfo, control: WorkerClient, links: dict[tuple[str, str], Link]
) -> None:
    try:
        links[source.name, worker.name] = await control.measure_link(source)
    except MacpipeError as e:
        log.info("the link from %s to %s was not measured: %s", source.name, worker.name, e.sentence)
