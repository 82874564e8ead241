"""A long run of agents' sessions: prefixes and marks stay within their budget, and memory of every process constant."""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from typing import Any

from cluster.client import Client
from cluster.core.limits import PREFIX_SHARE
from cluster.model.tokenizer import load_tokenizer
from cluster.security.keys import KeyStore
from faults.soak import is_flat
from integration.benches import ROOT
from integration.daemons import Cluster, Footprint, children, free_port

sys.path.append(str(ROOT / "ops" / "bench"))

from agent_client import Usage
from agent_models import make_agent_model
from agent_sessions import Ask, Script, recorded

KEYS = 3
AGENTS = 3
SUB_AGENTS = 3
AGENT_TURNS = 2
SAMPLE_S = 3.0
TOKENS = 4000
"""Of a generated session's last prompt."""
ANSWER_TOKENS = 6
SALTS = 4
"""A key's sessions begin in so many ways: some share what an earlier one left, others push it out."""
CONTEXT = 65_536
MEMORY = "96MiB"
"""Of a worker. A stage's prefixes may take half of what its weights leave: they fill it within minutes."""
LEAVES = 0.15
"""Share of the requests that their agent gives up: before the answer, at its first event, or in it."""


@dataclass
class AgentFound:
    """What happened. ``shares``: the largest share of its budget that prefixes and marks of a stage took, per sample.

    ``over``: the samples in which they took more, or with live sequences more than the stage has for caches.
    """

    answers: int = 0
    left: int = 0
    failed: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    shares: list[float] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    prefixes: int = 0
    footprints: dict[str, list[Footprint]] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether no process typically had more in the last quarter than in the one before.

        A long prompt's activations are memory too, so single samples tell little.
        """
        quarters = (
            (seen[len(seen) // 2 : -len(seen) // 4], seen[-len(seen) // 4 :]) for seen in self.footprints.values()
        )
        return all(is_flat([_typical(third), _typical(last)]) for third, last in quarters)

    @property
    def good(self) -> bool:
        return self.flat and not self.over and not self.failed

    def facts(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "left": self.left,
            "failed": self.failed[:10],
            "prompt_tokens": self.prompt_tokens,
            "cached_share": round(self.cached_tokens / max(1, self.prompt_tokens), 3),
            "samples": len(self.shares),
            "most_of_budget": round(max(self.shares, default=0.0), 3),
            "over": self.over[:10],
            "prefixes": self.prefixes,
            "flat": self.flat,
            "mib": {name: _tenths(seen) for name, seen in self.footprints.items()},
        }


def _typical(seen: Sequence[Footprint]) -> Footprint:
    """Return the median of each resource."""
    columns = ([f.resident for f in seen], [f.threads for f in seen], [f.files for f in seen], [f.own for f in seen])
    return Footprint(*(round(median(column)) for column in columns))


def _tenths(seen: Sequence[Footprint]) -> list[float]:
    return [round(f.resident / 2**20, 1) for f in seen[:: max(1, len(seen) // 10)]]


def choose_session(
    script: Script, number: int, recordings: Sequence[list[Ask]], rng: random.Random
) -> Iterator[list[Ask]]:
    """Return the turns of a session: of sub-agents, of a recording, or of a generated loop of tool calls."""
    if number % 3 == 1:
        return script.agents(SUB_AGENTS, TOKENS // 2, AGENT_TURNS)
    recorded_now = recordings and number % 3 == 2
    return ([ask] for ask in (rng.choice(recordings) if recorded_now else script.tool_session()))


class AgentSoak:
    """Two workers, and a coordinator with several API keys, which agents use at once.

    ``model_type`` is one of the bench's, ``recordings`` are replayed between generated sessions.
    """

    def __init__(self, folder: Path, model_type: str = "qwen3_next", recordings: Sequence[Path] = ()) -> None:
        self._cluster = Cluster(folder, mtls=True)
        self._sessions = [recorded(file) for file in recordings]
        model = make_agent_model(folder / "model", model_type, CONTEXT)
        self._tokenizer = load_tokenizer(model)
        workers = [self._cluster.worker(name, "--memory-limit", MEMORY) for name in ("hal", "ida")]
        for worker in workers:
            worker.wait_for("of cluster")
        self._port = free_port()
        keys = KeyStore(self._cluster.lead.folder)
        self._keys = [keys.create(f"agent-{i}")[1] for i in range(KEYS)]
        http = ("--http", f"127.0.0.1:{self._port}", "--max-context", str(CONTEXT))
        _, self._address = self._cluster.serving(str(model), 2, *http)
        self._lock = threading.Lock()

    def close(self) -> None:
        self._cluster.close()

    def minutes(self, minutes: float) -> AgentFound:
        """Run sessions for so long, then wait until nothing is live."""
        found, numbers, ends = AgentFound(), itertools.count(), time.monotonic() + 60 * minutes

        def work() -> None:
            while time.monotonic() < ends:
                self._run_session(found, next(numbers), ends)

        with ThreadPoolExecutor(AGENTS) as agents, Client(self._address, timeout_s=60) as client:
            working = [agents.submit(work) for _ in range(AGENTS)]
            while not all(agent.done() for agent in working):
                self._sample(found, client)
                time.sleep(SAMPLE_S)
            for agent in working:
                agent.result()
            deadline = time.monotonic() + 60
            while (state := client.cluster()).requests and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not state.requests
            self._sample(found, client)
        return found

    def _sample(self, found: AgentFound, client: Client) -> None:
        """Note the bytes of prefixes and marks of each stage, and the resources of each process."""
        state = client.cluster()
        found.prefixes = state.prefixes
        for stage in state.stages:
            budget = int(stage.cache_bytes * PREFIX_SHARE)
            if stage.prefix_bytes > budget or stage.prefix_bytes + stage.reserved_bytes > stage.cache_bytes:
                found.over.append(f"{stage.worker}: {stage.prefix_bytes} + {stage.reserved_bytes} of {budget}")
        found.shares.append(max(s.prefix_bytes / (s.cache_bytes * PREFIX_SHARE) for s in state.stages))
        for daemon in self._cluster.daemons:
            pids = [daemon.process.pid, *(children(daemon.process.pid) if daemon.name != "serve" else ())]
            for name, pid in zip((daemon.name, f"{daemon.name}'s engine"), pids, strict=False):
                found.footprints.setdefault(name, []).append(Footprint.of(pid))

    def _run_session(self, found: AgentFound, number: int, ends: float) -> None:
        """Run a session of one key. What a turn has is sent at once."""
        rng = random.Random(number)
        key, salt = rng.choice(self._keys), f"Project {rng.randrange(SALTS)}.\n"
        with ThreadPoolExecutor(SUB_AGENTS) as pool:
            for turn in choose_session(Script(self._tokenizer, TOKENS), number, self._sessions, rng):
                if time.monotonic() > ends:
                    return
                asks = [(ask.prepared(salt, ANSWER_TOKENS), random.Random(rng.random())) for ask in turn]
                for sent in [pool.submit(self._send, found, key, *ask) for ask in asks]:
                    sent.result()

    def _send(self, found: AgentFound, key: str, ask: Ask, rng: random.Random) -> None:
        """Send a request, and read its answer or leave. An error is noted; nothing is tried again."""
        leave_at = rng.choice((0, 1, 3)) if rng.random() < LEAVES else -1
        usage = Usage()
        try:
            left = self._read(key, ask, leave_at, usage)
        except (OSError, HTTPException) as error:
            found.failed.append(f"{type(error).__name__}: {error}")
            return
        with self._lock:
            found.left += left
            found.answers += not left
            found.prompt_tokens += usage.prompt
            found.cached_tokens += usage.cached

    def _read(self, key: str, ask: Ask, leave_at: int, usage: Usage) -> bool:
        """Read the answer's events. Return whether the agent left: at event ``leave_at``, at 0 before the answer."""
        headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
        headers["authorization"] = f"Bearer {key}"
        with closing(HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request("POST", ask.path, json.dumps(ask.body), headers)
            if leave_at == 0:
                time.sleep(random.Random(ask.path + str(ask.body)).random() / 2)  # somewhere in the prompt
                return True
            reply = connection.getresponse()
            if reply.status != 200:
                raise HTTPException(f"{reply.status} {reply.read(500)!r}")
            lines = (line for line in reply if line.startswith(b"data: {"))
            for number, line in enumerate(lines, start=1):
                event = json.loads(line[6:])
                if "error" in event or event.get("type") == "response.failed":
                    raise HTTPException(json.dumps(event)[:500])
                usage.read(event)
                if number == leave_at:
                    return True
        return False
