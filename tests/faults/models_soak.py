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
from faults.soak import is_flat
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
PROMPT = [(i * 37 + 11) % 250 for i in range(40)]


@dataclass
class ModelsFound:
    """What happened. ``refused``: a model did not fit beside busy ones. ``evictions`` are those in the log."""

    answers: int = 0
    left: int = 0
    refused: int = 0
    evictions: int = 0
    differing: int = 0
    failed: list[str] = field(default_factory=list)
    footprints: dict[str, list[Footprint]] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether no process typically had more in the last quarter than in the one before.

        Engines come and go with models, so single samples tell little.
        """
        quarters = (
            (seen[len(seen) // 2 : -len(seen) // 4], seen[-len(seen) // 4 :]) for seen in self.footprints.values()
        )
        return all(is_flat([_typical(third), _typical(last)]) for third, last in quarters)

    @property
    def good(self) -> bool:
        return self.flat and not self.differing and not self.failed

    def facts(self) -> dict[str, object]:
        return {
            "answers": self.answers,
            "left": self.left,
            "refused": self.refused,
            "evictions": self.evictions,
            "differing": self.differing,
            "failed": self.failed[:10],
            "flat": self.flat,
            "mib": {
                name: [round(f.resident / 2**20, 1) for f in seen[:: max(1, len(seen) // 10)]]
                for name, seen in self.footprints.items()
            },
            "files": {name: [seen[len(seen) // 2].files, seen[-1].files] for name, seen in self.footprints.items()},
            "threads": {
                name: [seen[len(seen) // 2].threads, seen[-1].threads] for name, seen in self.footprints.items()
            },
        }


def _typical(seen: list[Footprint]) -> Footprint:
    """Return the median of each resource."""
    columns = ([f.resident for f in seen], [f.threads for f in seen], [f.files for f in seen])
    return Footprint(*(round(median(column)) for column in columns))


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
        """Take a footprint of each daemon, and one of all its other processes together."""
        for daemon in self._cluster.daemons:
            found.footprints.setdefault(daemon.name, []).append(Footprint.of(daemon.process.pid))
            others = []
            for pid in children(daemon.process.pid):
                try:
                    others.append(Footprint.of(pid))
                except (OSError, ValueError):  # it has just ended
                    continue
            total = Footprint(*(sum(getattr(one, name) for one in others) for name in ("resident", "threads", "files")))
            found.footprints.setdefault(f"{daemon.name}'s processes", []).append(total)
