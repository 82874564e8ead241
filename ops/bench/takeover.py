"""Measures how long an answer pauses when its leader is killed: from the SIGKILL to the next token, by steps.

Three workers hold the bundled model, and two coordinators take turns: one leads, the other stands by and is in sync.
In each round a client that knows both reads a greedy answer, and the one that leads is killed in the middle of it. The
rest must be what an undisturbed answer has. Then the killed one is started again, and stands by for the next round.

The steps are those of the standby's log: it notices, wants to lead, is elected by the workers, and serves.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

from figures import Figure, options, print_figures

from cluster.cli.process_group import ProcessGroup, reserve_port
from cluster.client import Client, ClusterState
from cluster.core.errors import MacpipeError

HOST = "127.0.0.1"
MODEL = "faq"
WORKERS = ("a", "b", "c")
PROMPT = [5, 6, 7]
TOKENS = 100
KILLED_AT = 10
"""Tokens of an answer before the kill."""
MOST_WAIT_S = 120.0
READ_AHEAD = "model: read ahead"
STEPS = {
    "notices": "standby: stream ended",
    "stands": "standby: standing for election",
    "is_elected": "standby: elected",
    "listens": "leader: listening",
    "serves": "leader: serving",
}
"""Beginnings of the log's lines at which steps end. Another step ends with the next token."""


class Pair:
    """Two coordinators and the workers that they lead; logs and state are in ``folder``."""

    def __init__(self, stack: ExitStack, folder: Path, replicate: str) -> None:
        self._folder, self._replicate = folder, replicate
        self._processes = stack.enter_context(ProcessGroup(folder))
        self._cluster = f"bench-{folder.name}"
        self._ports = [stack.enter_context(reserve_port(HOST)) for _ in range(2)]
        self._pids = [0, 0]
        self._logs = [folder, folder]
        self._starts = 0
        self._peers = list[str]()
        for name in WORKERS:
            port = stack.enter_context(reserve_port(HOST))
            own = ["--name", name, "--port", str(port), "--profile", "off"]
            self._processes.start(name, ["worker", *own, *self._home(name)])
            self._peers += ["--peer", f"{HOST}:{port}"]
        self.leader = 0
        self._start(0, MODEL, "--workers", str(len(WORKERS)), "--wait", "90", "--replicate", replicate)
        self._wait(lambda state: state.state == "serving")
        self._stand_by(1)

    @property
    def addresses(self) -> str:
        """Where clients look for the leader, which comes first."""
        return ",".join(map(self._address, (self.leader, 1 - self.leader)))

    def kill_leader(self) -> float:
        """Kill the process that leads. Return when, in seconds of the system's clock."""
        killed_at = time.time()
        os.kill(self._pids[self.leader], signal.SIGKILL)
        self.leader = 1 - self.leader
        return killed_at

    def step_ends(self, killed_at: float) -> dict[str, float]:
        """Return when each of ``STEPS`` ended after the kill, by the log of the process that leads now."""
        ends: dict[str, float] = {}
        for line in self._logs[self.leader].read_text().splitlines():
            for step, beginning in STEPS.items():
                if line[24:].partition(" ")[2].startswith(beginning):
                    at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
                    if at > killed_at:
                        ends[step] = at
        return ends

    def start_killed(self) -> None:
        """Start the coordinator that was killed last; it stands by."""
        self._stand_by(1 - self.leader)

    def _stand_by(self, number: int) -> None:
        """Start a standby, and wait until it has all that clients saw and has read the model."""
        self._start(number, "--standby", "--coordinator", self._address(self.leader))
        self._wait(lambda state: _is_whole(state) and READ_AHEAD in self._logs[number].read_text())

    def _start(self, number: int, *arguments: str) -> None:
        self._starts += 1
        name = f"coordinator-{number}-{self._starts}"
        own = ["--http", "off", "--port", str(self._ports[number]), "--peers-only", *self._peers]
        home = self._home(f"coordinator-{number}")
        self._logs[number] = self._folder / f"{name}.log"
        self._pids[number] = self._processes.start(name, ["serve", *arguments, *own, *home])

    def _home(self, name: str) -> list[str]:
        return ["--cluster", self._cluster, "--home", str(self._folder / name)]

    def _address(self, number: int) -> str:
        return f"{HOST}:{self._ports[number]}"

    def _wait(self, is_so: Callable[[ClusterState], bool]) -> None:
        """Wait until the state of the one that leads is so. Raises ``TimeoutError``."""
        end = time.monotonic() + MOST_WAIT_S
        while time.monotonic() < end:
            with suppress(MacpipeError), Client(self._address(self.leader), timeout_s=5) as client:
                if is_so(client.cluster()):
                    return
            time.sleep(0.1)
        raise TimeoutError(f"the coordinators were not ready within {MOST_WAIT_S:.0f} s; their logs: {self.said()}")

    def said(self) -> str:
        """Return the ends of both logs."""
        return "\n".join(log.read_text()[-2000:] for log in self._logs if log.is_file())


def _is_whole(state: ClusterState) -> bool:
    standbys = state.leadership.standbys if state.leadership else ()
    return state.state == "serving" and [one.in_sync for one in standbys] == [True]


def play(pair: Pair, expected: Sequence[int]) -> tuple[dict[str, float], float]:
    """Kill the leader in the middle of an answer. Return what each step took, and the whole pause, in seconds.

    Raises ``RuntimeError`` if other tokens follow than ``expected``.
    """
    said, at = list[int](), list[float]()
    with Client(pair.addresses, timeout_s=MOST_WAIT_S) as client:
        for token in client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
            said.append(token.token)
            at.append(time.time())
            if len(said) == KILLED_AT:
                at = [pair.kill_leader()]
    killed_at = at[0]
    _, resumed_at = max((after - before, after) for before, after in pairwise(at))  # some tokens were on their way
    if said != list(expected):
        raise RuntimeError(f"the answer differs after the kill: {said}, not {expected}")
    ends = [*pair.step_ends(killed_at).items(), ("token", resumed_at)]
    took, before = {}, killed_at
    for step, end in ends:
        took[step], before = end - before, end
    return took, resumed_at - killed_at


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--replicate", choices=("sync", "async"), default="sync")
    asked = parser.parse_args()
    steps = {step: list[float]() for step in (*STEPS, "token")}
    pauses = list[float]()
    load = list[float]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-takeover-")))
        pair = Pair(stack, folder, asked.replicate)
        with Client(pair.addresses, timeout_s=MOST_WAIT_S) as client:
            expected = client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True).tokens
        for number in range(1, asked.rounds + 1):
            load.append(os.getloadavg()[0])
            took, pause_s = play(pair, expected)
            pauses.append(pause_s)
            for step, seconds in took.items():
                steps[step].append(seconds)
            said = ", ".join(f"{step} {seconds:.2f}" for step, seconds in took.items())
            print(f"round {number}, s: {pause_s:.2f} ({said})", file=sys.stderr, flush=True)
            pair.start_killed()
    figures = [Figure(step, "s", found) for step, found in steps.items()]
    figures.append(Figure("pause", "s", pauses))
    p99 = quantiles(pauses, n=100, method="inclusive")[98] if len(pauses) > 1 else pauses[0]
    print_figures("medians", figures, {"pause_p99": p99}, asked.json, {"load": [round(one, 1) for one in load]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
