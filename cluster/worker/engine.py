"""The engine: the process that holds the slice. Its main thread is the only MLX thread; other threads handle bytes.

It reads commands from its daemon on stdin and answers on stdout; frames use its own data port. Before it is told to
begin it has imported everything but opened neither the device nor the port, so it can wait as a standby. It ends when
stdin closes, so an engine never outlives its daemon. It does not know the cluster: the daemon names its neighbours.
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
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from cluster.core.errors import BadFrame, MacpipeError, PrefixMissing, StaleEpoch
from cluster.core.plan import LayerRange
from cluster.core.prefix_keys import pack_beginnings
from cluster.discovery.interfaces import further_hosts, interfaces
from cluster.model import device
from cluster.model.device_speed import measure_device
from cluster.model.process_group import has_rdma, join_group
from cluster.model.sharding import Group
from cluster.model.sum_speed import measure_sums
from cluster.platform.logs import LogLevel, configure_logging
from cluster.platform.overload import TimerLag
from cluster.security.credentials import open_trust
from cluster.security.trust import WORKER, Trust
from cluster.transport.grpc_streams import GrpcDialer
from cluster.worker.data_port import DataPort
from cluster.worker.held_port import HeldPort
from cluster.worker.pipe_messages import (
    Begin,
    Command,
    CommandFailed,
    Done,
    Event,
    Fence,
    GetReport,
    GroupPortHeld,
    Hello,
    HoldGroupPort,
    JoinGroup,
    LayOutCopy,
    LinkStage,
    Load,
    Measure,
    Measured,
    MeasureSums,
    OpenPrefixes,
    PrefixesOpened,
    Progress,
    QuantizeLayers,
    ReadPrefix,
    Reported,
    SetAdapters,
    SumsMeasured,
    Unload,
    pack,
    read,
    unpacker,
)
from cluster.worker.prefix_disk import PrefixDisk, PrefixDiskPlace
from cluster.worker.settings import prefix_folder
from cluster.worker.stage_host import StageHost, Throttle, classify_error
from cluster.worker.weight_quantizer import lay_out_copy, quantize_layers

Job = Callable[[], None]
_Queued = (
    Load
    | HoldGroupPort
    | JoinGroup
    | MeasureSums
    | Fence
    | LayOutCopy
    | QuantizeLayers
    | LinkStage
    | SetAdapters
    | OpenPrefixes
    | Unload
    | Measure
)
"""The commands that the MLX thread runs."""
_ANSWERED = Measure | OpenPrefixes | HoldGroupPort | MeasureSums
"""Those that have an answer of their own."""


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
        disk: PrefixDiskPlace | None = None,
        every_address: bool = False,
    ) -> None:
        self._answers = answers
        self._throttle = throttle or Throttle()
        self._answering = threading.Lock()
        # Bounded by its producers: frames by the coordinator's window, commands by its open calls.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        device.choose()
        facts = device.device_facts()
        limit = memory_limit or facts.memory_limit
        device.set_limits(limit)
        self._limit = limit
        self._host_address = host
        self._group_port: HeldPort | None = None
        self._group: Group | None = None
        self._began: float | None = None
        self._disk = PrefixDisk(disk.folder, disk.limit, self._jobs.put) if disk else None
        dialer = GrpcDialer(trust, TimerLag().start(), lambda: self._host.term)
        self._host = StageHost(self._jobs.put, dialer, self._throttle, self._disk)
        self._data_port = DataPort(trust, host, port, self._host, lambda: self._host.term)
        if every_address:
            self._data_port.follow(lambda: further_hosts(host, interfaces()))
        self._send_hello(facts, limit)

    def _send_hello(self, facts: device.DeviceFacts, limit: int) -> None:
        self._send(
            Hello(
                self._data_port.port,
                facts.chip,
                facts.backend,
                facts.mlx_version,
                facts.mlx_lm_version,
                facts.memory_total,
                limit,
            )
        )

    def run(self) -> None:
        """Run jobs until ``stop``."""
        while (job := self._jobs.get()) is not None:
            self._began = time.monotonic()
            job()
            self._began = None
        self._host.unload()
        if self._disk:
            self._disk.close()
        self._data_port.stop()
        device.close_thread()

    def stop(self) -> None:
        """End, after the step that is being computed: the daemon is gone, and its successor may serve another term."""
        self._host.close_streams()
        self._jobs.put(None)

    def submit(self, command: Command) -> None:
        """Queue a command. A report is answered at once, on the caller's thread; a read from disk has its own.

        A fence closes the streams at once, so it waits for no frame but the one that is being computed.
        """
        if isinstance(command, Fence):
            self._host.close_streams()
        if isinstance(command, GetReport):
            began = self._began
            busy_ms = 0 if began is None else int((time.monotonic() - began) * 1e3)
            used, peak = device.memory_used(), self._host.memory_peak
            on_disk = (self._disk.nbytes, self._disk.evictions) if self._disk else (0, 0)
            report = Reported(command.call, used, self._host.sequences, peak, busy_ms, *on_disk)
            hosts = self._data_port.further_hosts
            self._send(replace(report, adapters=self._host.adapters, data_hosts=hosts))
        elif isinstance(command, ReadPrefix):
            self._read_prefix(command)
        else:
            self._jobs.put(lambda: self._run_command(command))

    def _read_prefix(self, command: ReadPrefix) -> None:
        def answer(error: MacpipeError | None) -> None:
            failed = error and CommandFailed(command.call, error.reason, error.sentence)
            self._send(failed or Done(command.call))

        if self._disk:
            self._disk.read(command, answer)
        else:
            answer(PrefixMissing("this worker keeps no prefixes on disk"))

    def _run_command(self, command: _Queued) -> None:
        try:
            self._dispatch(command)
        except Exception as e:  # the process's edge: the daemon is told, whatever it was
            reason, sentence = classify_error(e)
            epoch = e.details.get("epoch", "") if isinstance(e, StaleEpoch) else ""
            self._send(CommandFailed(command.call, reason, sentence, epoch))
        else:
            if not isinstance(command, _ANSWERED):
                self._send(Done(command.call))

    def _dispatch(self, command: _Queued) -> None:
        if isinstance(command, HoldGroupPort | JoinGroup | MeasureSums):
            self._run_group_command(command)
        elif isinstance(command, Measure):
            self._send(Measured.of(command.call, *measure_device(self._throttle.stretch)))
        elif isinstance(command, Load):
            device.set_limits(min(command.memory_limit or self._limit, self._limit))
            call = command.call
            self._host.load(
                command.spec, lambda done, total: self._send(Progress(call, done, total)), command.term, self._group
            )
        elif isinstance(command, Fence):
            self._host.end_epoch()
        elif isinstance(command, LayOutCopy | QuantizeLayers):
            self._quantize(command)
        elif isinstance(command, LinkStage):
            self._host.link(command.epoch, command.pull_from, command.peer, command.reader)
        elif isinstance(command, SetAdapters):
            self._host.set_adapters(command.epoch, command.refs)
        elif isinstance(command, OpenPrefixes):
            owners = command.owners.split("\n")
            found = self._host.open_prefixes(command.epoch, command.edition, owners, anonymous=command.anonymous)
            self._send(PrefixesOpened(command.call, pack_beginnings(found)))
        elif self._host.epoch <= command.epoch:
            self._host.unload()

    def _run_group_command(self, command: HoldGroupPort | JoinGroup | MeasureSums) -> None:
        """Hold a port, meet the other ranks, or time sums with them. Until MLX listens, the port stays held.

        Progress tells that it begins to meet: until the others are there, this process answers nothing.
        """
        if isinstance(command, MeasureSums):
            if self._group is None:
                raise StaleEpoch("this engine has joined no group, so it cannot time its sums")
            found = measure_sums(self._group)
            self._send(SumsMeasured(command.call, found.seconds, found.bandwidth, found.is_disturbed))
            return
        if isinstance(command, HoldGroupPort):
            held = self._group_port or HeldPort(self._host_address, self._data_port.further_hosts)
            self._group_port = held
            self._send(GroupPortHeld(command.call, held.number, has_rdma()))
            return
        self._send(Progress(command.call, 0, 0))
        self._group = join_group(command.rank, command.addresses)
        if self._group_port:
            self._group_port.close()

    def _quantize(self, command: LayOutCopy | QuantizeLayers) -> None:
        """Work on a copy. Before weights are computed, free the present stage: two would need more memory than one."""
        if isinstance(command, LayOutCopy):
            lay_out_copy(Path(command.models), command.key, Path(command.source), command.weight_bits, command.model)
            return
        self._host.unload()
        quantize_layers(
            Path(command.models),
            command.key,
            Path(command.source),
            command.weight_bits,
            LayerRange(command.start_layer, command.end_layer),
            lambda done, total: self._send(Progress(command.call, done, total)),
        )
        device.release()

    def _send(self, event: Event) -> None:
        with self._answering, contextlib.suppress(BrokenPipeError):
            self._answers.write(pack(event))
            self._answers.flush()


def _wait_for_begin(commands: BinaryIO) -> Begin | None:
    """Wait for the daemon's ``Begin``, its first message; None if the pipe closes without one."""
    found = read(unpacker(), os.read(commands.fileno(), 65536))
    return next((first for first in found if isinstance(first, Begin)), None)


def _read_commands(engine: Engine, commands: BinaryIO) -> None:
    """Submit commands until the daemon closes the pipe or ends."""
    stream = unpacker()
    try:
        while data := os.read(commands.fileno(), 65536):
            for command in read(stream, data):
                if isinstance(command, Command):
                    engine.submit(command)
    except BadFrame as e:
        sys.stderr.write(f"the engine stops: {e.sentence}\n")
    engine.stop()


def _claim_stdout() -> BinaryIO:
    """Reserve stdout for answers: output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _prefix_place(options: argparse.Namespace) -> PrefixDiskPlace | None:
    if not options.prefix_disk:
        return None
    return PrefixDiskPlace(prefix_folder(options.home, options.worker), options.prefix_disk)


def main() -> int:
    parser = argparse.ArgumentParser(description="The engine of a macpipe worker; started by its daemon.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--every-address", action="store_true", help="listen on the Mac's other addresses, too")
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--worker", required=True, help="name of the worker whose credentials it uses in a cluster")
    parser.add_argument("--prefix-disk", type=int, metavar="BYTES", help="keep prefixes on disk, up to this size")
    parser.add_argument("--throttle", type=float, default=1.0)
    parser.add_argument("--log-level", type=LogLevel, default=LogLevel.INFO)
    options = parser.parse_args()
    configure_logging(options.log_level)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon gets the same signal and ends us by closing the pipe
    answers = _claim_stdout()
    if (begin := _wait_for_begin(sys.stdin.buffer)) is None:
        return 0  # it was a standby and was not needed
    try:
        trust = open_trust(options.home, options.cluster, WORKER, name=options.worker)
        throttle, disk = Throttle(options.throttle), None if begin.number else _prefix_place(options)
        engine = Engine(
            trust,
            options.host,
            options.port and options.port + begin.number,
            options.memory_limit,
            answers,
            throttle,
            disk,
            every_address=options.every_address,
        )
    except MacpipeError as e:
        answers.write(pack(CommandFailed(0, e.reason, e.sentence)))
        answers.flush()
        return 1
    threading.Thread(target=_read_commands, args=(engine, sys.stdin.buffer), name="commands", daemon=True).start()
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
