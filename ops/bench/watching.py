"""Measures what it costs the coordinator to be watched: its processor time and memory with live views and without.

Users send one request after the other. In turns, nobody watches, or `macpipe top` and the page's live events do. The
ratio is that of processor time per generated token, so that it does not depend on how fast the machine is meanwhile.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

from figures import Figure, options, print_figures
from loopback import make_llama, start_cluster

from cluster.cli.process_group import reserve_port
from cluster.client import Client
from cluster.platform.overload import processor_seconds
from cluster.platform.process import list_commands, resident_bytes

CONTEXT = 2048
PROMPT = list(range(5, 37))
TOKENS = 128
EVENTS = "/api/events"
SHAPE = {"hidden": 64, "intermediate": 128, "layers": 4, "heads": 4}
WINDOW = b"\x1b["


def coordinator_pid() -> int:
    """Return the id of the coordinator that this process started."""
    for line in list_commands().splitlines():
        pid, parent, command = line.split(None, 2)
        if int(parent) == os.getpid() and " -m cluster serve " in command:
            return int(pid)
    raise RuntimeError("the coordinator was not found among this process's children")


@contextmanager
def load(address: str, users: int) -> Iterator[None]:
    """Send requests of ``users`` users, each one after the other, until the end of the block."""
    ended = threading.Event()

    def ask() -> None:
        with Client(address, timeout_s=300) as client:
            while not ended.is_set():
                client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)

    threads = [threading.Thread(target=ask) for _ in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def top(address: str) -> Iterator[None]:
    """Keep ``macpipe top`` open on a terminal of its own; return once it has drawn."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "cluster", "top", "--coordinator", address]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    drawn = threading.Event()

    def read() -> None:
        with suppress(OSError):  # Linux says so once the process has left the terminal
            while data := os.read(master, 65536):
                if WINDOW in data:
                    drawn.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        if not drawn.wait(60):
            raise RuntimeError("macpipe top did not draw within 60 s")
        yield
    finally:
        process.terminate()
        process.wait(20)
        reader.join(20)
        os.close(master)


@contextmanager
def page(port: int) -> Iterator[bool]:
    """Read the page's live events. Yields False, and reads nothing, if the coordinator has no page."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", EVENTS, headers={"accept": "text/event-stream"})
    answer = connection.getresponse()
    if answer.status != 200:
        connection.close()
        yield False
        return

    def read() -> None:
        with suppress(OSError, ValueError):  # closed below
            while answer.readline():
                pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield True
    finally:
        if connection.sock:
            connection.sock.shutdown(2)
        reader.join(20)
        connection.close()


def measure(client: Client, pid: int, seconds: float) -> tuple[float, float, float]:
    """Return the coordinator's milliseconds of processor time per token, its MiB, and the cluster's tokens a second."""
    state, cpu = client.cluster(), processor_seconds(pid) or 0.0
    time.sleep(seconds)
    spent, after = (processor_seconds(pid) or 0.0) - cpu, client.cluster()
    tokens = after.tokens_generated - state.tokens_generated
    if not tokens:
        raise RuntimeError(f"no token was generated within {seconds:.0f} s; use a longer --seconds")
    rate = tokens / (after.uptime_seconds - state.uptime_seconds)
    return spent / tokens * 1e3, resident_bytes(pid) / 2**20, rate


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--users", type=int, default=4)
    asked = parser.parse_args()
    alone: list[tuple[float, float, float]] = []
    watched: list[tuple[float, float, float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-watching-")))
        model = make_llama(folder / "model", context=CONTEXT, **SHAPE)
        port = stack.enter_context(reserve_port("127.0.0.1"))
        client = start_cluster(stack, model, "--http", f"127.0.0.1:{port}")
        pid = coordinator_pid()
        stack.enter_context(load(client.address, asked.users))
        measure(client, pid, asked.seconds / 5)  # a warm-up
        pages = []
        for _ in range(asked.rounds):
            alone.append(measure(client, pid, asked.seconds))
            with top(client.address), page(port) as has_page:
                pages.append(has_page)
                watched.append(measure(client, pid, asked.seconds))
    figures = [
        Figure(f"{name}_{kind}", unit, [one[i] for one in rounds])
        for i, (kind, unit) in enumerate((("cpu", "ms a token"), ("memory", "MiB"), ("rate", "tokens/s")))
        for name, rounds in (("alone", alone), ("watched", watched))
    ]
    ratios = [after[0] / before[0] for before, after in zip(alone, watched, strict=True)]
    more = {"with_page": all(pages), "users": asked.users}
    print_figures("medians", figures, {"cpu_ratio": median(ratios)}, asked.json, more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
