"""Runs several ``macpipe`` processes on this machine with one lifetime. It does not interpret their output.

No process outlives this one. Each has a pipe as standard input that only this process holds open, and exits when the
pipe closes (``cluster.platform.process``).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from cluster.core.errors import MacpipeError
from cluster.platform.process import isolated_environment

GRACE_S: Final = 5.0
"""Total time for all processes between SIGTERM and SIGKILL."""
LOG_LINES: Final = 20
"""How many of the last log lines of an exited process are shown."""
ENDING: Final = "--exit-with-stdin"
POLL_S: Final = 0.05
AGAIN_S: Final = 0.2
"""Time after which a signal that had no effect is sent again."""
RESERVABLE: Final = range(10_000, 32_768)
"""Ports that no well-known service has, and below those that Linux and macOS choose themselves."""
RESERVE_ATTEMPTS: Final = 100
Handler = Callable[[int, FrameType | None], object] | int | None


@dataclass(frozen=True, slots=True)
class ManagedProcess:
    """A process and its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class ProcessGroup:
    """``macpipe`` processes with their logs in ``folder``. Leaving the context ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._members: list[ManagedProcess] = []

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        program: Path | None = None,
    ) -> int:
        """Start ``macpipe ARGUMENTS --exit-with-stdin`` in its own session, so that Ctrl-C does not reach it.

        ``environment`` extends this process's environment. ``program`` is a script to run in place of ``macpipe``.
        Return the id of the process, which is its group's too.
        """
        log = self._folder / f"{name}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, *([str(program)] if program else ["-m", "cluster"]), *arguments, ENDING],
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
                env={**isolated_environment(os.environ), **(environment or {})},
            )
        self._members.append(ManagedProcess(name, process, log))
        return process.pid

    def check(self) -> None:
        """Raise MacpipeError with the last log lines if a process has exited."""
        for member in self._members:
            if (code := member.process.poll()) is not None:
                lines = member.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
                output = "".join(f"\n  {line}" for line in lines) or " no output"
                raise MacpipeError(f"the {member.name} exited with {code}:{output}", process=member.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for member in reversed(self._members):
            member.process.terminate()
        deadline = time.monotonic() + GRACE_S
        for member in self._members:
            with suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.0, deadline - time.monotonic()))
        for member in self._members:
            _end(member.process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session, so this kills its children too
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class SignalExit:
    """While it is entered, ``signals`` unwind the block and exit with 128 + signal number.

    Further signals are ignored, so that they do not interrupt the unwinding.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._before: dict[int, Handler] = {}
        self._leaving = False
        self._insisting = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._leave) for number in self._signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def insisting(self) -> Iterator[None]:
        """Send a signal that came to the main thread again, every ``AGAIN_S`` until the block ends.

        Python's handler runs between two instructions: a signal that comes right before a blocking system call is
        noticed only when that returns. And compiled code may swallow an exception that a handler raises in it:
        importing grpc did in one run of sixty.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        ended = threading.Event()
        repeater = threading.Thread(target=self._repeat, args=(reader, ended), name="signal-repeater", daemon=True)
        repeater.start()
        self._insisting = True
        try:
            yield
        finally:
            self._insisting = False
            ended.set()
            signal.set_wakeup_fd(before)
            writer.close()
            repeater.join()
            reader.close()

    def _repeat(self, reader: socket.socket, ended: threading.Event) -> None:
        """Wait for one of the signals, which the system's handler writes to ``reader``, then repeat it until ended."""
        while came := reader.recv(1):
            while came[0] in self._signals and not ended.wait(AGAIN_S):
                signal.pthread_kill(_main_thread(), came[0])

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self._leaving and not self._insisting:
            return
        self._leaving = True
        for other in {signal.SIGTERM, signal.SIGHUP, signal.SIGINT} - {number}:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)


def _main_thread() -> int:
    """Return the id of the thread that runs Python's signal handlers."""
    return threading.main_thread().ident or 0


@contextmanager
def reserve_port(host: str) -> Iterator[int]:
    """Choose a TCP port of an IPv4 address for a process that this one starts. Raise MacpipeError if none is free.

    Until the block ends, no other process that calls this gets the same port: the UDP port of that number is bound
    meanwhile. Nor does the system give it to a connection, since it takes higher ones for those.
    """
    for port in random.sample(RESERVABLE, RESERVE_ATTEMPTS):
        with closing(socket.socket(type=socket.SOCK_DGRAM)) as claim:
            if _claim(claim, host, port):
                yield port
                return
    raise MacpipeError(f"no free port was found on {host}; end some of the programs that listen there")


def _claim(udp: socket.socket, host: str, port: int) -> bool:
    """Bind the UDP port if it and the TCP port of that number are free. Return whether they are."""
    try:
        udp.bind((host, port))
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True
