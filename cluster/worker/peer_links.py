"""Choose the link to another worker among the addresses that both Macs share, by what was measured over each.

The receiving worker measures and remembers, so a recovery and a restarted coordinator know the links at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address

import anyio

from cluster.core.errors import LinkFailed, MacpipeError
from cluster.core.link_limits import MAX_SHARED_HOSTS
from cluster.core.plan import Link
from cluster.core.text import parse_address
from cluster.discovery.interfaces import interfaces, shared_hosts, title_of
from cluster.security.trust import Trust, worker_of
from cluster.transport.link_probe import find_own_address, measure_link
from cluster.worker.profile_file import ProfileFile

log = logging.getLogger(__name__)

Pull = Callable[[str], Awaitable[object]]
"""Opens the streams from a data address. Raises ``LinkFailed`` if it cannot be reached."""


class PeerLinks:
    """The links from other workers to this one, kept in ``file``."""

    def __init__(self, trust: Trust, file: ProfileFile) -> None:
        self._trust, self._file = trust, file

    async def measure(self, worker: str, address: str, others: Sequence[str], *, afresh: bool) -> Link:
        """Return the best link from a worker, whose data port is at ``address`` and at ``others``.

        Each is measured, one after the other, unless that was done recently; ``afresh`` measures all of them. Raises
        the error of ``address`` if none can be measured.
        """
        known = {a: None if afresh else self._file.link(worker, a) for a in (address, *others)}
        links = [replace(link, address=a) for a, link in known.items() if link]
        own = await self._find_own_addresses([a for a, link in known.items() if link is None])
        failure: MacpipeError | None = None
        local = interfaces()
        for unknown, own_address in own.items():
            if not own_address and unknown != address:
                continue
            try:
                measured = await anyio.to_thread.run_sync(measure_link, self._trust, unknown, worker_of(worker))
            except MacpipeError as e:
                failure = failure or e
                self._file.forget_link(worker, unknown)
            else:
                links.append(replace(measured, interface=title_of(own_address, local), address=unknown))
                self._file.put_link(worker, unknown, links[-1])
        if not links and failure:
            raise failure
        return min(links, key=lambda link: link.cost_s)

    async def _find_own_addresses(self, addresses: Iterable[str]) -> dict[str, str]:
        """Return this Mac's own address on a connection to each address, empty where it cannot be reached."""
        found = dict.fromkeys(addresses, "")

        async def find(address: str) -> None:
            found[address] = await anyio.to_thread.run_sync(find_own_address, address)

        async with anyio.create_task_group() as tasks:
            for address in found:
                tasks.start_soon(find, address)
        return found

    async def pull(self, worker: str, address: str, others: Sequence[str], pull: Pull) -> Link | None:
        """Pull over the best measured link that can be reached, or the next best if that fails.

        Links that were not measured come last, ``address`` before ``others``. Return the link, None if it was not
        measured. Raises the last ``LinkFailed`` if all fail. A link that fails where another works is forgotten.
        """
        known = {a: self._file.link(worker, a, math.inf) for a in (address, *others)}
        ordered = sorted(known, key=lambda a: _cost(known[a]))
        reachable = ordered
        if others:
            own = await self._find_own_addresses(ordered)
            reachable = [a for a in ordered if own[a]] or [address]
        for i, one in enumerate(reachable):
            try:
                await pull(one)
            except LinkFailed as e:
                log.warning("link: failed reason=%s address=%s", e.sentence, one)
                if i == len(reachable) - 1:
                    raise
            else:
                for failed in ordered[: ordered.index(one)]:
                    self._file.forget_link(worker, failed)
                return known[one]
        raise AssertionError("there is always an address")


def choose_shared(address: str, others: Iterable[str]) -> list[str]:
    """Return which further addresses of a data port are in a subnet of this Mac, at most as many as are measured."""
    ports = {str(ip_address(parse_address(other)[0])): other for other in others if other != address}
    return [ports[host] for host in shared_hosts(ports, interfaces())][: MAX_SHARED_HOSTS - 1]


def _cost(link: Link | None) -> float:
    return link.cost_s if link else math.inf
