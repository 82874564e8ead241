"""A long run without faults, with clients that come and go: memory and files of every process stay constant."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.client import Client
from cluster.core.errors import MacpipeError
from faults.campaign import VOCABULARY
from faults.scenario import pool
from integration.daemons import Cluster, Footprint, children, wait_serving

CLIENTS = 4
LOOKS = 40
"""Footprints taken over a run; the first quarter counts as warming up."""
FILES = 8
GROWTH = 1.10
"""Memory may end so much above what it was once warm: kept prefixes fill their share, allocators keep what they had."""
BYTES = 16 * 2**20
MEMORY = "8MiB"
"""What a worker may use: enough for all live answers, and so little for kept prefixes that they fill it at once."""


@dataclass
class Found:
    """``footprints`` by process, in the order in which they were taken."""

    cycles: int = 0
    tokens: int = 0
    differing: int = 0
    failed: list[str] = field(default_factory=list)
    """Why answers ended early that nobody cancelled."""
    prefixes: int = 0
    """Kept on the engines at the end, which is memory that may grow up to its bound."""
    took_s: float = 0.0
    footprints: dict[str, list[Footprint]] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        return all(is_flat(seen[len(seen) // 4 :]) for seen in self.footprints.values())

    def facts(self) -> dict[str, object]:
        ends = {name: (seen[len(seen) // 4], seen[-1]) for name, seen in self.footprints.items()}
        processes = {
            name: {
                "mib": [round(f.resident / 2**20, 1) for f in self.footprints[name][:: LOOKS // 10]],
                "files": [a.files, b.files],
                "threads": [a.threads, b.threads],
            }
            for name, (a, b) in ends.items()
        }
        told = {"cycles": self.cycles, "tokens": self.tokens, "differing": self.differing, "failed": self.failed}
        return {
            **told,
            "flat": self.flat,
            "prefixes": self.prefixes,
            "seconds": round(self.took_s, 1),
            "processes": processes,
        }


def is_flat(seen: list[Footprint]) -> bool:
    """Whether a process needs no more at the end than at the beginning, but for what allocators keep."""
    first, last = seen[0], seen[-1]
    memory = last.resident <= max(first.resident * GROWTH, first.resident + BYTES)
    return memory and last.files <= first.files + FILES and last.threads <= first.threads + FILES


class Soak:
    """Two workers and a coordinator, which several clients use at once."""

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(folder)
        workers = [self._cluster.worker(name, "--memory-limit", MEMORY) for name in ("hal", "ida")]
        for worker in workers:
            worker.wait_for("of cluster")
        self._serve, self._address = self._cluster.serving("faq", 2)
        wait_serving(self._address, self._serve)
        self._asked = pool(VOCABULARY)
        with Client(self._address, timeout_s=120) as client:
            self._expected = [
                client.generate(list(a.prompt), max_tokens=a.max_tokens, ignore_eos=True, **dict(a.sampling)).tokens
                for a in self._asked
            ]

    def close(self) -> None:
        self._cluster.close()

    def cycles(self, count: int) -> Found:
        """Connect, send a request and cancel it that many times: before the answer, at its first token, or in it."""
        return self._used(lambda done, began: done < count, lambda done, began: done / count, self._cancelled)

    def minutes(self, minutes: float) -> Found:
        """Answers of every kind, one in three cancelled, for so long."""
        seconds = 60 * minutes
        return self._used(
            lambda done, began: time.monotonic() - began < seconds,
            lambda done, began: (time.monotonic() - began) / seconds,
            self._mixed,
        )

    def _used(
        self,
        goes_on: Callable[[int, float], bool],
        share: Callable[[int, float], float],
        use: Callable[[Found, int], None],
    ) -> Found:
        found, numbers, lock, began = Found(), itertools.count(), threading.Lock(), time.monotonic()

        def work() -> None:
            while goes_on(number := next(numbers), began):
                use(found, number)
                with lock:
                    found.cycles += 1
                    if len(next(iter(found.footprints.values()), ())) <= share(found.cycles, began) * LOOKS:
                        self._look(found)

        with ThreadPoolExecutor(CLIENTS) as clients:
            for client in [clients.submit(work) for _ in range(CLIENTS)]:
                client.result()
        found.took_s = time.monotonic() - began
        self._settled(found)
        return found

    def _settled(self, found: Found) -> None:
        """A last look, once every connection has gone."""
        deadline = time.monotonic() + 30
        with Client(self._address, timeout_s=30) as client:
            while (state := client.cluster()).requests and time.monotonic() < deadline:
                time.sleep(0.1)
        found.prefixes = state.prefixes
        time.sleep(1.0)
        self._look(found)

    def _look(self, found: Found) -> None:
        for daemon in self._cluster.daemons:
            pids = [daemon.process.pid, *children(daemon.process.pid)]
            for name, pid in zip((daemon.name, f"{daemon.name}'s engine"), pids, strict=False):
                found.footprints.setdefault(name, []).append(Footprint.of(pid))

    def _cancelled(self, found: Found, number: int) -> None:
        rng = random.Random(number)
        asked, leave_at = rng.choice(self._asked), rng.choice((-1, 0, 1, 5))
        with Client(self._address, timeout_s=120) as client, suppress(MacpipeError):
            stream = client.stream(list(asked.prompt), max_tokens=60, ignore_eos=True, **dict(asked.sampling))
            if leave_at >= 0:
                stream.wait_accepted()
            for token in stream if leave_at > 0 else ():
                found.tokens += 1
                if token.index + 1 >= leave_at:
                    break
            stream.cancel()

    def _mixed(self, found: Found, number: int) -> None:
        if number % 3 == 0:
            self._cancelled(found, number)
            return
        at = random.Random(number).randrange(len(self._asked))
        asked = self._asked[at]
        with Client(self._address, timeout_s=120) as client:
            try:
                said = client.generate(
                    list(asked.prompt), max_tokens=asked.max_tokens, ignore_eos=True, **dict(asked.sampling)
                ).tokens
            except MacpipeError as e:
                found.failed.append(e.sentence)
                return
        found.tokens += len(said)
        found.differing += said != self._expected[at]
