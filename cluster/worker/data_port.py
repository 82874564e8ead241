"""The engine's data port: the same port on the worker's own address and on further addresses of this machine.

Another worker may reach it over a faster cable than its coordinator does. Addresses come and go with cables, so a
thread looks for them again. It opens no address that only a person may choose, such as a tunnel's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from cluster.core.errors import PortInUse
from cluster.core.link_limits import DATA_HOSTS_S, MAX_DATA_HOSTS
from cluster.security.trust import Trust
from cluster.transport.grpc_streams import DataServer, Stages, TermOf, no_term

log = logging.getLogger(__name__)


class DataPort:
    """A listening data port. ``port`` is the actual port number, on every address. ``term`` is that of its streams."""

    def __init__(self, trust: Trust, host: str, port: int, stages: Stages, term: TermOf = no_term) -> None:
        self._trust, self._stages, self._term = trust, stages, term
        self._first = DataServer(trust, host, port, stages, term)
        self.port = self._first.port
        self._further: dict[str, DataServer] = {}
        self._taken: set[str] = set()
        self._changing = threading.Lock()
        self._stopped = threading.Event()

    @property
    def further_hosts(self) -> tuple[str, ...]:
        """The addresses beside its own at which it listens."""
        return tuple(self._further)

    def follow(self, find: Callable[[], Iterable[str]]) -> None:
        """Listen on what ``find`` returns, now and, on a thread, after each change until ``stop``."""
        self.listen_on(find())
        threading.Thread(target=self._follow, args=(find,), name="data addresses", daemon=True).start()

    def _follow(self, find: Callable[[], Iterable[str]]) -> None:
        while not self._stopped.wait(DATA_HOSTS_S):
            self.listen_on(find())

    def listen_on(self, hosts: Iterable[str]) -> None:
        """Listen on these further addresses, at most ``MAX_DATA_HOSTS``, and no longer on others.

        An address that has gone takes its streams with it. One whose port another program uses is left out.
        """
        wanted = list(hosts)[:MAX_DATA_HOSTS]
        with self._changing:
            if self._stopped.is_set():
                return
            for host in self._further.keys() - wanted:
                self._further.pop(host).stop()
                log.info("data port: closed, the address is gone host=%s", host)
            for host in wanted:
                if host not in self._further and (server := self._open(host)):
                    self._further[host] = server

    def _open(self, host: str) -> DataServer | None:
        """Return a server on this address, None if it cannot be opened."""
        try:
            return DataServer(self._trust, host, self.port, self._stages, self._term)
        except PortInUse as e:  # once: it is tried again and again
            if host not in self._taken:
                log.warning("data port: not opened reason=%s host=%s", e.sentence, host)
            self._taken.add(host)
            return None

    def stop(self) -> None:
        self._stopped.set()
        with self._changing:
            for server in (self._first, *self._further.values()):
                server.stop()
