"""Measure the links between workers. The receiving worker measures, and keeps the result for ``LINK_KEPT_S`` seconds.

In round k, each worker measures the link from the worker k places ahead, so no worker sends or receives twice at once.
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
    """Return the links, keyed by the names (from, to).

    A pair that cannot be measured is left out; the plan assumes an ordinary link for it.
    """
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
        log.info("link: not measured reason=%s from=%s to=%s", e.sentence, source.name, worker.name)
