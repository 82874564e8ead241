"""An overloaded machine is slow, not dead: answers continue, nothing is killed, and ``status`` says why it is slow.

Every process is stopped and continued over and over, each in its own time, so that each runs for a fifth of the time
and its timers fire late. This has the effect of many busy programs, without taking the processors from other tests.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.client import Client
from integration.daemons import Cluster, children

STOPPED_S, RUNNING_S = (1.6, 2.4), 0.5
TOKENS, ANSWERS = 4, 8
WORKERS = ("ada", "bob", "cyd")


@contextmanager
def overloaded(cluster: Cluster, rng: random.Random) -> Iterator[None]:
    """Let every daemon and engine run for ``RUNNING_S`` and then stop for one of ``STOPPED_S``, over and over."""
    over = threading.Event()

    def alternate(pid: int, rng: random.Random) -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(rng.uniform(*STOPPED_S))
                os.kill(pid, signal.SIGCONT)
                over.wait(RUNNING_S)

    pids = [pid for d in cluster.daemons for pid in (d.process.pid, *children(d.process.pid))]
    threads = [threading.Thread(target=alternate, args=(pid, random.Random(rng.random()))) for pid in pids]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_on_overloaded_machines_every_token_comes_and_no_engine_is_killed(tmp_path: Path, rng: random.Random) -> None:
    cluster = Cluster(tmp_path)
    try:
        for name in WORKERS:
            cluster.worker(name).wait_for(f"worker {name} of cluster")
        serve, address = cluster.serving("faq", len(WORKERS))
        engines = [children(d.process.pid)[0] for d in cluster.daemons[: len(WORKERS)]]
        with Client(address, timeout_s=300) as client, overloaded(cluster, rng):
            client.generate("What is a hop?", max_tokens=TOKENS, ignore_eos=True)
            while not all(w.lag_seconds for w in client.cluster().workers):
                time.sleep(0.5)
            ended = [time.monotonic()]
            for _ in range(ANSWERS):
                answer = client.generate("What is a hop?", max_tokens=TOKENS, ignore_eos=True)
                assert answer.usage.completion_tokens == TOKENS
                ended.append(time.monotonic())
            state = client.cluster()
        print(f"seconds an answer: {[round(b - a, 1) for a, b in pairwise(ended)]}; {state.recoveries} recoveries")
        assert state.lag_seconds > 0
        assert state.recoveries <= 3, serve.said()  # what it takes to learn
        assert [children(d.process.pid)[0] for d in cluster.daemons[: len(WORKERS)]] == engines
    finally:
        cluster.close()
