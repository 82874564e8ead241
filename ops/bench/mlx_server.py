"""Runs `mlx_lm.server` for comparisons with macpipe, in one process or as a pipeline of several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cluster.cli.process_group import reserve_port

READY_S = 120
GRACE_S = 8
POLL_S = 0.2
NAME = "default_model"
"""The name of the model that the server was started with."""


class MlxServer:
    """The processes of one server, and its port on loopback."""

    def __init__(self, model: Path, folder: Path, port: int, ranks: Sequence[int], options: Sequence[str]) -> None:
        """Start a process, or one for each of ``ranks``, the ports of a ring. Their logs go to ``folder``."""
        self.port, processes = port, len(ranks) or 1
        self._log = folder / "mlx-0.log"
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(self.port), *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder)}
        if ranks:
            command.append("--pipeline")
            hosts = folder / "hosts.json"
            hosts.write_text(json.dumps([[f"127.0.0.1:{rank}"] for rank in ranks]))
            environment |= {"MLX_HOSTFILE": str(hosts), "MLX_WORLD_SIZE": str(processes)}
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(processes):
            with (folder / f"mlx-{rank}.log").open("wb") as log:
                own = {**environment, "MLX_RANK": str(rank)} if ranks else environment
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=own))

    def wait_ready(self) -> None:
        """Wait until the server answers. Exit with the end of its log if it ends or does not answer in ``READY_S``."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=2):
                return
            time.sleep(POLL_S)
        raise SystemExit(f"mlx_lm.server does not answer:\n{self._log.read_text(errors='replace')[-2000:]}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop its processes during the block: an idle pipeline polls its sockets and takes more than a core."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the processes."""
        self._signal(signal.SIGTERM)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


@contextmanager
def mlx_server(model: Path, folder: Path, *options: str, processes: int = 1) -> Iterator[MlxServer]:
    """Run a server of ``model`` with ``options`` while the context lasts. It is ready when the context is entered."""
    with ExitStack() as stack:
        port, *ranks = (
            stack.enter_context(reserve_port("127.0.0.1")) for _ in range(1 + (processes if processes > 1 else 0))
        )
        server = MlxServer(model, folder, port, ranks, options)
        stack.callback(server.close)
        server.wait_ready()
        yield server
