"""The engine: the process that holds the slice. Its main thread is the one MLX thread; all others touch only bytes.

It takes commands from its daemon on stdin and answers on stdout; frames come and go on its own data port. Until it is
told to begin it has imported everything and touched neither device nor port: so it can stand by for another. It ends
when stdin does, so an engine never outlives its daemon. It refuses to know the cluster: who its neighbours are is told.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cluster.core.errors import BadFrame, MacpipeError, StaleEpoch
from cluster.model import device
from cluster.model import device_speed as speed
from cluster.platform.overload import TimerLag
from cluster.security.credentials import open_trust
from cluster.security.trust import WORKER, Trust
from cluster.transport.grpc_streams import DataServer, GrpcDialer
from cluster.worker.pipe_messages import (
    Begin,
    Command,
    CommandFailed,
    Done,
    Event,
    GetReport,
    Hello,
    LinkStage,
    Load,
    Measure,
    Measured,
    Progress,
    Reported,
    Unload,
    pack,
    read,
    unpacker,
)
from cluster.worker.stage_host import StageHost, sentence_of
from cluster.worker.throttle import Throttle

Job = Callable[[], None]


class Engine:
    """Runs jobs (commands and frames) one after another on the thread that called ``run``."""

    def __init__(
        self,
        trust: Trust,
        host: str,
        port: int,
        memory_limit: int | None,
        answers: BinaryIO,
        throttle: Throttle | None = None,
    ) -> None:
        self._answers = answers
        self._throttle = throttle or Throttle()
        self._answering = threading.Lock()
        # Bounded by what feeds it: frames by the coordinator's window, commands by its open calls.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        device.choose()
        facts = device.device_facts()
        limit = memory_limit or facts.memory_limit
        device.set_limits(limit)
        self._began: float | None = None
        self._slot = StageHost(self._jobs.put, GrpcDialer(trust, TimerLag().start()), self._throttle)
        self._server = DataServer(trust, host, port, self._slot)
        self._say_hello(facts, limit)

    def _say_hello(self, facts: device.DeviceFacts, limit: int) -> None:
        self._say(
            Hello(
                self._server.port,
                facts.chip,
                facts.backend,
                facts.mlx_version,
                facts.mlx_lm_version,
                facts.memory_total,
                limit,
            )
        )

    def run(self) -> None:
        """Work until ``stop``."""
        while (job := self._jobs.get()) is not None:
            self._began = time.monotonic()
            job()
            self._began = None
        self._slot.unload()
        self._server.stop()
        device.close_thread()

    def stop(self) -> None:
        self._jobs.put(None)

    def obey(self, command: Command) -> None:
        """Queue a command; a report is answered at once, on the caller's thread."""
        if isinstance(command, GetReport):
            began = self._began
            busy_ms = 0 if began is None else int((time.monotonic() - began) * 1e3)
            used, peak = device.memory_used(), device.memory_peak()
            self._say(Reported(command.call, used, self._slot.sequences, peak, busy_ms))
        else:
            self._jobs.put(lambda: self._carry_out(command))

    def _carry_out(self, command: Load | LinkStage | Unload | Measure) -> None:
        try:
            self._do(command)
        except Exception as e:  # the process's edge: the daemon is told, whatever it was
            reason, sentence = sentence_of(e)
            epoch = e.details.get("epoch", "") if isinstance(e, StaleEpoch) else ""
            self._say(CommandFailed(command.call, reason, sentence, epoch))
        else:
            if not isinstance(command, Measure):
                self._say(Done(command.call))

    def _do(self, command: Load | LinkStage | Unload | Measure) -> None:
        if isinstance(command, Measure):
            p = speed.measure(self._throttle.stretch)
            self._say(Measured(command.call, p.bandwidth, p.layer_s, p.step_s, p.flops, p.row_cost))
        elif isinstance(command, Load):
            self._slot.load(command.spec, lambda done, total: self._say(Progress(command.call, done, total)))
        elif isinstance(command, LinkStage):
            self._slot.link(command.epoch, command.pull_from, command.peer)
        elif self._slot.epoch <= command.epoch:
            self._slot.unload()

    def _say(self, event: Event) -> None:
        with self._answering, contextlib.suppress(BrokenPipeError):
            self._answers.write(pack(event))
            self._answers.flush()


def _wait_for_begin(commands: BinaryIO) -> bool:
    """Wait for the daemon's first word, after which it waits for hello; False where it ends without one."""
    return any(isinstance(first, Begin) for first in read(unpacker(), os.read(commands.fileno(), 65536)))


def _obey_commands(engine: Engine, commands: BinaryIO) -> None:
    """Read commands until the daemon closes the pipe or is gone."""
    stream = unpacker()
    try:
        while data := os.read(commands.fileno(), 65536):
            for command in read(stream, data):
                if isinstance(command, Command):
                    engine.obey(command)
    except BadFrame as e:
        sys.stderr.write(f"the engine ends: {e.sentence}\n")
    engine.stop()


def _claim_stdout() -> BinaryIO:
    """Keep stdout for answers alone: whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description="The engine of a macpipe worker; started by its daemon.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--worker", required=True, help="whose credentials it takes, in a cluster")
    parser.add_argument("--throttle", type=float, default=1.0)
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon gets the same signal, and ends us by closing the pipe
    answers = _claim_stdout()
    if not _wait_for_begin(sys.stdin.buffer):
        return 0  # it stood by, and was not needed
    try:
        trust = open_trust(options.home, options.cluster, WORKER, name=options.worker)
        engine = Engine(trust, options.host, options.port, options.memory_limit, answers, Throttle(options.throttle))
    except MacpipeError as e:
        answers.write(pack(CommandFailed(0, e.reason, e.sentence)))
        answers.flush()
        return 1
    threading.Thread(target=_obey_commands, args=(engine, sys.stdin.buffer), name="commands", daemon=True).start()
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
