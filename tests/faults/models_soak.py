"""A long run in which three models come and go on Macs that hold two: no process grows."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx

from checkpoints import make
from cluster.client import Client
from cluster.model.tokenizer import load_tokenizer
from integration.daemons import Cluster, Footprint, children, free_port, until
from integration.reference import greedy

ARCHITECTURES = ("llama", "qwen3", "gemma3_text")
CLIENTS = 3
SAMPLE_S = 3.0
CONTEXT = 256
TOKENS = 20
MEMORY = "640KiB"
"""Of each of two workers: one model with the caches of one full context, or a part of one and of another."""
TURN_S = 40.0
"""One of the models has a rest for so long, which is longer than a model stays at least: then it may leave."""
LEAVES = 0.2
"""Share of the requests whose client hangs up, most of them while the model is loaded."""
GROWTH = 1.03
"""The median of a process's own memory in the last quarter of a run may be so much that of the second quarter: the
first fills pools, caches and the history of frames. Pages of files, such as code that runs for the first time, are no
growth."""
SLACK = {"files": 8, "threads": 8, "processes": 1}
"""What one more loaded model needs: by chance, fewer may be loaded at once in one quarter than in another."""
PROMPT = [(i * 37 + 11) % 250 for i in range(40)]


@dataclass(frozen=True)
class Seen:
    """One look at a process: its resources, and the number of its own processes."""

    footprint: Footprint
    processes: int = 0


@dataclass
class ModelsFound:
    """What happened. ``refused``: a model did not fit beside busy ones. ``evictions`` are those in the log."""

    answers: int = 0
    left: int = 0
    refused: int = 0
    evictions: int = 0
    differing: int = 0
    failed: list[str] = field(default_factory=list)
    seen: dict[str, list[Seen]] = field(default_factory=dict)

    def grown(self, growth: float = GROWTH) -> list[str]:
        """Return what grew between the second and the last quarter of the run: processes, and of what.

        ``growth`` is the ratio that memory may reach, see ``GROWTH``.
        """
        found = []
        for name, seen in self.seen.items():
            before, last = (_Quarter.of(seen, number) for number in (1, 3))
            if last.own > before.own * growth:
                found.append(f"{name}: memory")
            found += [f"{name}: {what}" for what, n in SLACK.items() if getattr(last, what) > getattr(before, what) + n]
        return found

    @property
    def good(self) -> bool:
        return not (self.grown() or self.differing or self.failed)

    def facts(self) -> dict[str, object]:
        counts = {name: getattr(self, name) for name in ("answers", "left", "refused", "evictions", "differing")}
        return {**counts, "failed": self.failed[:10], "grown": self.grown(), "quarters": self._quarters()}

    def _quarters(self) -> dict[str, dict[str, list[float]]]:
        """Return each process's resources by quarter."""
        return {
            name: {
                "mib": [round(one.resident / 2**20, 1) for one in quarters],
                "own_mib": [round(one.own / 2**20, 1) for one in quarters],
                "files": [one.files for one in quarters],
                "threads": [one.threads for one in quarters],
                "processes": [one.processes for one in quarters],
            }
            for name, seen in self.seen.items()
            if (quarters := [_Quarter.of(seen, number) for number in range(4)])
        }


@dataclass(frozen=True)
class _Quarter:
    """A process in a quarter of the run: the medians of its memory in bytes, and the least of everything else.

    Files, threads and processes follow the models that are loaded at the moment, so only their least tells of a leak.
    """

    resident: float
    own: float
    files: int
    threads: int
    processes: int

    @classmethod
    def of(cls, seen: list[Seen], number: int) -> _Quarter:
        own = seen[len(seen) * number // 4 : len(seen) * (number + 1) // 4]
        return cls(
            median(one.footprint.resident for one in own),
            median(one.footprint.own for one in own),
            min(one.footprint.files for one in own),
            min(one.footprint.threads for one in own),
            min(one.processes for one in own),
        )


class ModelsSoak:
    """Two workers and a coordinator with three models, which several clients use at once."""

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(folder, mtls=False)
        folders = [make(architecture, folder / architecture) for architecture in ARCHITECTURES]
        self._expected = {one.name: load_tokenizer(one).decode(greedy(one, PROMPT, TOKENS)) for one in folders}
        for worker in [self._cluster.worker(name, "--memory-limit", MEMORY) for name in ("hal", "ida")]:
            worker.wait_for("of cluster")
        http, first, *others = free_port(), *folders
        self._url, port = f"http://127.0.0.1:{http}", free_port()
        options = ("--http", f"127.0.0.1:{http}", "--max-context", str(CONTEXT), "--port", str(port))
        self._serve = self._cluster.serve(first, *map(str, others), *options)
        self._address = f"127.0.0.1:{port}"
        until(self._is_serving, 60)

    def _is_serving(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._cluster.close()

    def minutes(self, minutes: float) -> ModelsFound:
        """Ask for models for so long, then wait until nothing is live."""
        found, numbers, ends, lock = ModelsFound(), itertools.count(), time.monotonic() + 60 * minutes, threading.Lock()

        def work() -> None:
            with httpx.Client(base_url=self._url, timeout=180) as client:
                while time.monotonic() < ends:
                    self._ask(client, found, next(numbers), lock)

        with ThreadPoolExecutor(CLIENTS) as clients:
            working = [clients.submit(work) for _ in range(CLIENTS)]
            while not all(one.done() for one in working):
                self._look(found)
                time.sleep(SAMPLE_S)
            for one in working:
                one.result()
        with Client(self._address, timeout_s=30) as client:
            until(lambda: not client.cluster().requests, 30)
        found.evictions = self._serve.said().count("evicting a model")
        return found

    def _ask(self, client: httpx.Client, found: ModelsFound, number: int, lock: threading.Lock) -> None:
        rng = random.Random(number)
        resting = ARCHITECTURES[int(time.monotonic() / TURN_S) % len(ARCHITECTURES)]
        name = rng.choice([one for one in ARCHITECTURES if one != resting])
        body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        leaves = rng.random() < LEAVES
        try:
            answer = client.post(
                "/v1/completions",
                json={**body, "stream": leaves and rng.random() < 0.5},
                timeout=rng.choice((0.02, 0.2, 1.0)) if leaves else 180,
            )
        except httpx.TimeoutException:
            with lock:
                found.left += 1
            return
        with lock:
            if answer.status_code == 503 and "does not fit beside" in answer.text:
                found.refused += 1
            elif answer.status_code != 200:
                found.failed.append(answer.text[:300])
            elif not leaves:
                found.answers += 1
                found.differing += answer.json()["choices"][0]["text"] != self._expected[name]
        if answer.status_code == 503:
            time.sleep(rng.random())

    def _look(self, found: ModelsFound) -> None:
        """Look at each daemon, and at the first engine of each worker, which stays while others come and go."""
        for daemon in self._cluster.daemons:
            pid, own = daemon.process.pid, children(daemon.process.pid)
            found.seen.setdefault(daemon.name, []).append(Seen(Footprint.of(pid), len(own)))
            if daemon is not self._serve:
                found.seen.setdefault(f"{daemon.name}'s engine", []).append(Seen(Footprint.of(own[0])))
