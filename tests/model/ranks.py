"""Ranks of a group as processes that reach each other over loopback, with MLX's ring of TCP connections.

The module is also the ranks' program: ``python ranks.py TASK ARGUMENTS...`` with MLX_RANK and MLX_HOSTFILE set. A rank
that fails, or that cannot listen on its port, ends its group; who started it ends the others.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from cluster.core.errors import RankFailed
from cluster.core.frames import Frame
from cluster.core.plan import StageSpec
from cluster.model.loading import load_slice
from cluster.model.model_shape import read_shape
from cluster.model.process_group import Lockstep, settle_sums
from cluster.wire.frame_codec import decode, encode
from model.ring import CHUNKS, PROMPT, Ring, cuts, nothing, open_stage

ANSWER = 6
ATTEMPTS = 5
"""Another process may take a port between its choice and its use."""
BUSY = 75
"""The exit code of a rank that cannot join its group."""
LIMIT_S = 900.0
"""How long a group lives at most: a rank waits for a lost one for ever."""

_PORTS = itertools.count(20_000 + os.getpid() % 1000 * 10)


def free_ports(count: int) -> list[int]:
    """Choose ports that no system gives away on its own: MLX shares a port with others that have it, and then hangs."""
    ports: list[int] = []
    while len(ports) < count:
        with suppress(OSError), socket.create_server(("127.0.0.1", port := next(_PORTS))):
            ports.append(port)
    return ports


@contextmanager
def group_of(size: int, folder: Path, task: str, *arguments: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the ranks of a group, and end them all when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    command = [sys.executable, str(Path(__file__)), task, *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe))
        with _ended_after(LIMIT_S, ranks):
            yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@contextmanager
def _ended_after(limit_s: float, ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End the ranks, and with them whoever reads from them, if the block takes longer."""

    def end() -> None:
        for process in ranks:
            process.kill()

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_group(size: int, folder: Path, task: str, *arguments: str) -> list[Any]:
    """Run a task on all ranks of a group. Return what each rank printed, as JSON."""
    for _ in range(ATTEMPTS):
        with group_of(size, folder, task, *arguments) as ranks:
            printed = _outputs(ranks)
            codes = [process.returncode for process in ranks]
        if BUSY not in codes:
            break
    assert codes == [0] * size, "\n".join(error.decode() for _, error in printed)
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def _outputs(ranks: Sequence[subprocess.Popen[bytes]]) -> list[tuple[bytes, bytes]]:
    """Wait for all ranks; once one has failed, end the others, which would wait for it for ever."""
    printed: list[tuple[bytes, bytes]] = [(b"", b"")] * len(ranks)

    def follow(rank: int) -> None:
        printed[rank] = ranks[rank].communicate()
        if ranks[rank].returncode != 0:
            for process in ranks:
                process.kill()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return printed


def join_group() -> mx.distributed.Group:
    try:
        return mx.distributed.init(strict=True, backend="ring")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(BUSY)


def own_logits(path: Path, group: mx.distributed.Group | None, tokens: Sequence[int] = ()) -> list[mx.array]:
    """Return the logits of mlx-lm's own answer, sharded by a group or whole. It is fed ``tokens``, or its own."""
    model, _ = load_model(path, lazy=group is not None)
    if group:
        model.shard(group)
        mx.eval(model.parameters())
    caches = make_prompt_cache(model)

    def forward(fed: Sequence[int]) -> mx.array:
        out = model(mx.array([fed]), cache=caches)
        return out[0] if isinstance(out, tuple) else out

    return answer(forward, lambda _: mx.eval([cache.state for cache in caches]), tokens)


def sliced_logits(path: Path, group: mx.distributed.Group, stages: int, tokens: Sequence[int] = ()) -> list[mx.array]:
    """Return the same of slices, one behind the other in this process, which have read only their part."""
    shape = read_shape(path, "m", None)
    specs = [StageSpec(1, i, stages, shape.model, own, shape.max_context) for i, own in enumerate(cuts(shape, stages))]
    slices = [load_slice(spec, path, nothing, group)[0] for spec in specs]
    caches = [part.new_caches() for part in slices]

    def forward(fed: Sequence[int]) -> mx.array:
        values: list[mx.array] = []
        for part, own in zip(slices, caches, strict=True):
            with settle_sums() if len(fed) > 1 else nullcontext():
                values = part.run(mx.array([fed]), own, values)
            mx.eval(values)
        return values[0]

    return answer(forward, lambda _: mx.eval([array for own in caches for array in own.arrays()]), tokens)


def answer(forward: Any, settle: Any, tokens: Sequence[int] = ()) -> list[mx.array]:
    """Prefill the prompt in chunks, and decode greedily, or the ``tokens`` given. Return the logits of each step."""
    at = 0
    for size in CHUNKS:
        if part := PROMPT[at : min(at + size, len(PROMPT) - 1)]:
            settle(forward(part))
        at += size
    found: list[mx.array] = []
    fed = PROMPT[-1]
    for i in range(ANSWER):
        logits = forward((fed,))[0, -1]
        mx.eval(logits)
        found.append(logits)
        fed = tokens[i] if tokens else int(mx.argmax(logits).item())
    return found


def picks(logits: Sequence[mx.array]) -> list[int]:
    return [int(mx.argmax(step).item()) for step in logits]


def digest(logits: Sequence[mx.array]) -> str:
    return hashlib.sha256(b"".join(bytes(memoryview(step.astype(mx.float32))) for step in logits)).hexdigest()


def compare(*paths: str) -> dict[str, Any]:
    """Compare, for each checkpoint, slices in one and in two stages with mlx-lm, sharded alike and whole."""
    group = join_group()
    return {path: _compare(Path(path), group) for path in paths}


def _compare(path: Path, group: mx.distributed.Group) -> Mapping[str, Any]:
    own = own_logits(path, group)
    want = digest(own)
    whole = own_logits(path, None, picks(own))
    return {
        "digest": want,
        "finite": all(bool(mx.all(mx.isfinite(step)).item()) for step in own),
        "same": [digest(sliced_logits(path, group, stages)) == want for stages in (1, 2)],
        "tokens": picks(own),
        "whole": picks(whole),
        "difference": max(mx.abs(a - b).max().item() for a, b in zip(own, whole, strict=True)),
    }


def agree() -> list[str]:
    """Meet after steps in which all ranks computed the same, and after one in which the last rank did not.

    Return what each meeting said.
    """
    group = join_group()
    lockstep, said = Lockstep(group), []
    for wrong in (0.0, 0.0, 2**-20, 0.0):
        state = mx.ones((1, 1, 64)) + (wrong if group.rank() == group.size() - 1 else 0.0)
        lockstep.note([state, state.astype(mx.bfloat16)])
        mx.eval(lockstep.noted)
        try:
            lockstep.meet()
            said.append("")
        except RankFailed as error:
            said.append(error.sentence)
    return said


def serve(path: str, index: str, count: str) -> dict[str, Any]:
    """Be one rank of a stage: answer frames from stdin on stdout, until stdin closes.

    The first answer is JSON: the tokens of mlx-lm's own answer, sharded by this group.
    """
    group = join_group()
    shape = read_shape(Path(path), "m", None)
    own = cuts(shape, int(count))[int(index)]
    stage = open_stage(shape, Path(path), own, int(index), int(count), group=group)
    write_message(sys.stdout.buffer, json.dumps(picks(own_logits(Path(path), group))).encode())
    while message := read_message(sys.stdin.buffer):
        write_message(sys.stdout.buffer, encode(stage.step(decode(message))))
    return {}


def write_message(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(len(content).to_bytes(8, "little") + content)
    pipe.flush()


def read_message(pipe: IO[bytes]) -> bytes:
    """Return the next message; nothing at the pipe's end."""
    return pipe.read(int.from_bytes(pipe.read(8), "little"))


class RankedStage:
    """A stage of a ring whose ranks are processes: each gets every frame, and the first one's answers go on.

    Only the first one samples. All else that they answer must be the same.
    """

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks

    def step(self, frame: Frame) -> Frame:
        message = encode(frame)
        for rank in self._ranks:
            assert rank.stdin
            write_message(rank.stdin, message)
        first, *others = [decode(read_message(rank.stdout)) for rank in self._ranks if rank.stdout]
        for other in others:
            assert not other.samples
            assert encode(other) == encode(replace(first, samples=()))
        return first


class GroupRing(Ring):
    """A whole model as stages that are groups. ``own`` are the tokens of mlx-lm itself, sharded alike."""

    def __init__(self, stages: Sequence[RankedStage], own: list[int]) -> None:
        self.stages = list(stages)  # type: ignore[assignment]
        self.own = own
        self._number = 0


@contextmanager
def group_ring(path: Path, folder: Path, sizes: Sequence[int]) -> Iterator[GroupRing]:
    """Start a group of each size as a stage, all at the same time, and end them when the block ends."""
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(len(sizes)))

        def start(index: int) -> tuple[RankedStage, list[int]]:
            where = folder / str(index)
            ranks, first = _started(stack, sizes[index], where, "serve", str(path), str(index), str(len(sizes)))
            return RankedStage(ranks), json.loads(first)

        started = list(threads.map(start, range(len(sizes))))
        yield GroupRing([stage for stage, _ in started], started[0][1])


def _started(stack: ExitStack, size: int, folder: Path, *task: str) -> tuple[Sequence[subprocess.Popen[bytes]], bytes]:
    """Start a group until all its ranks have found each other. Return them and their first message."""
    for _ in range(ATTEMPTS):
        ranks = stack.enter_context(group_of(size, folder, *task))
        first = [read_message(rank.stdout) for rank in ranks if rank.stdout]
        if all(first):
            assert len(set(first)) == 1
            return ranks, first[0]
        codes = [rank.wait() for rank in ranks]
        assert BUSY in codes, codes
    raise AssertionError("no free ports")


if __name__ == "__main__":
    print(json.dumps({"agree": agree, "compare": compare, "serve": serve}[sys.argv[1]](*sys.argv[2:])))
