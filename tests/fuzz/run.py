"""Run one target: a number of inputs from a seed, each decoded within bounds, and the findings.

An input is a finding if its decoder raises an unexpected error, takes too long, or allocates too much memory. The run's
own memory is measured after a tenth of its inputs and at the end.
"""

from __future__ import annotations

import logging
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Final

import msgpack

from fuzz.targets import Prepared, Target

CORPUS: Final = Path(__file__).parent / "corpus"
SLOW_S: Final = 2.0
"""Of a processor's time, for one input: no decoder of at most 64 KiB needs it."""
ROOM: Final = 1 << 30
"""Bytes of address space that one input may ask for, above what the run had before it."""
KEPT_FINDINGS: Final = 20
DRIFT_BYTES: Final = 8 * 1024
"""An input that has grown beyond this is not spoiled further: it would only take longer."""


@dataclass
class Finding:
    """``where`` is the innermost line of ours; one of several inputs that fail there is kept."""

    error: str
    where: str
    data: bytes
    times: int = 1


@dataclass
class Ran:
    """The results of one target's inputs. Memory is in bytes, times are seconds."""

    target: str
    inputs: int = 0
    taken: int = 0
    """Inputs that were decoded; the others were refused as they may be."""
    seconds: float = 0.0
    slowest_s: float = 0.0
    memory_tenth: int = 0
    memory_end: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)


class Runner:
    """Tries inputs on one target, and keeps the account. ``refusal`` is the last that was allowed."""

    def __init__(self, target: Target) -> None:
        self.prepared = target.prepare()
        self.ran = Ran(target.name)
        self.refusal = ""

    def one(self, data: bytes) -> None:
        """Decode one input, which never raises here but for what ends the process."""
        self.ran.inputs += 1
        began = time.thread_time()
        logging.disable()  # what is wrong with an input is told to logs at will
        try:
            self.prepared.decode(data)
            self.ran.taken += 1
        except self.prepared.allowed as refusal:
            self.refusal = _said(refusal)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust's is none of Exception's
            self._found(error, data)
        finally:
            logging.disable(logging.NOTSET)
        took = time.thread_time() - began
        self.ran.slowest_s = max(self.ran.slowest_s, took)
        if took > SLOW_S:
            self._found(TimeoutError(f"took {took:.1f} s"), data)

    def _found(self, error: BaseException, data: bytes) -> None:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/cluster/" in f.filename] or [None]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours[-1] else "in the target"
        key = f"{type(error).__name__} {where}"
        if key in self.ran.findings:
            self.ran.findings[key].times += 1
        elif len(self.ran.findings) < KEPT_FINDINGS:
            self.ran.findings[key] = Finding(_said(error), where, data)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def corpus(target: str) -> list[bytes]:
    """The inputs that are kept for a target, regressions among them, in the order of their names."""
    return [file.read_bytes() for file in sorted((CORPUS / target).glob("*")) if file.is_file()]


def run(target: Target, inputs: int, seed: int, told: Callable[[Ran], None] = lambda ran: None) -> Ran:
    """Run the seeds, the corpus, and mutations of both, ``inputs`` in all."""
    runner, rng, began = Runner(target), Random(f"{seed} {target.name}"), time.monotonic()
    with bounded_memory():
        for data in _inputs(runner.prepared, target.name, inputs, rng):
            runner.one(data)
            if runner.ran.inputs == max(1, inputs // 10):
                runner.ran.memory_tenth = resident()
            if runner.ran.inputs % 10_000 == 0:
                told(runner.ran)
    runner.ran.memory_end = resident()
    runner.ran.seconds = time.monotonic() - began
    return runner.ran


def _inputs(prepared: Prepared, name: str, count: int, rng: Random) -> Iterator[bytes]:
    """Yield valid inputs first, then mutations of each, some repeated so that they drift away from their seed."""
    whole = [*prepared.seeds, *corpus(name)]
    yield from whole[:count]
    data = b""
    for number in range(count - len(whole)):
        if not number or len(data) > DRIFT_BYTES or rng.random() < 0.4:
            data = rng.choice(whole)
        data = prepared.spoil(data, rng, whole)
        yield data


@contextmanager
def bounded_memory() -> Iterator[None]:
    """An input that asks for much more than there was before gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, before[1]))
    except (OSError, ValueError):  # macOS does not bound address space
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident() -> int:
    """Return the bytes of memory that this process holds now; if the system does not tell, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pack(ran: Ran) -> bytes:
    """Return the result as bytes, for another process."""
    return bytes(msgpack.packb(asdict(ran)))


def unpack(data: bytes) -> Ran:
    """Read the output of ``pack``."""
    facts = msgpack.unpackb(data)
    findings = {where: Finding(**finding) for where, finding in facts.pop("findings").items()}
    return Ran(**facts, findings=findings)
