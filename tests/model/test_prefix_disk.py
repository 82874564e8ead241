"""Prefixes on disk: what is read back goes on as a fresh sequence does, and what is not whole is not read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import make
from cluster.core.frames import Compute, Drop, Join, Leave, Mark, Persist, Restore, Save, Step
from cluster.core.plan import ModelShape
from cluster.model.model_shape import read_shape
from effort import chosen
from model.disks import OTHER, OWNER, Disks
from model.ring import ALL, PROMPT, Ring, logprobs

KINDS = ("llama", "llama_sliding", "gemma3_text", "qwen3_next", "mamba2", "rwkv7", "falcon_h1", "deepseek_v41")
Rings = Callable[[str], Ring]


@pytest.fixture(scope="module")
def rings(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    return cache(lambda arch: Ring(shape(arch), checkpoint(arch), 2))


def keep(ring: Ring, tokens: tuple[int, ...], marks: tuple[int, ...], prefix: int = 1) -> None:
    """Feed a sequence, mark it on the way, and keep it."""
    ring.send(Join(1, 1, ALL))
    at = 0
    for end in sorted({*marks, len(tokens)}):
        ring.send(step=Step(Compute.PREFILL, (1,), (tokens[at:end],)))
        if end in marks:
            ring.send(Mark(1, end))
        at = end
    ring.send(Save(1, prefix), Leave(1))


def check(ring: Ring, prefix: int, tokens: tuple[int, ...], marks: tuple[int, ...]) -> None:
    """A sequence that starts from the prefix goes on as one that was fed the same chunks."""
    ring.send(Join(2, 1, ALL), Restore(2, prefix, len(tokens)), Join(3, 1, ALL))
    at = 0
    for end in sorted({*(m for m in marks if m < len(tokens)), len(tokens)}):
        ring.send(step=Step(Compute.PREFILL, (3,), (tokens[at:end],)))
        at = end
    for token in (3, 77, 5):
        got, want = ring.decode(2, token), ring.decode(3, token)
        assert mx.array_equal(logprobs(got), logprobs(want)).item()
    ring.send(Leave(2), Leave(3))


@pytest.mark.parametrize("arch", chosen(KINDS, "llama", "llama_sliding", "qwen3_next", "falcon_h1", "deepseek_v41"))
def test_what_is_read_after_a_restart_goes_on_as_a_fresh_sequence(arch: str, rings: Rings, tmp_path: Path) -> None:
    ring = rings(arch)
    disks = Disks(ring, tmp_path)
    keep(ring, PROMPT, (19, 32))
    disks.persist(1)
    ring.send(Drop(1))
    disks.restart()
    assert len({frozenset(told) for told in disks.told}) == 1
    assert 32 in {end for end, _ in disks.told[0]}
    for prefix, (end, _) in enumerate(sorted(disks.told[0]), 10):
        assert disks.read(prefix, PROMPT[:end]) == [None, None]
        check(ring, prefix, PROMPT[:end], (19, 32))
        ring.send(Drop(prefix))
    disks.close()


@pytest.fixture
def kept(rings: Rings, tmp_path: Path) -> Iterator[Disks]:
    """The disks of a llama of which ``PROMPT`` has been written, and which have been started anew since."""
    ring = rings("llama")
    disks = Disks(ring, tmp_path)
    keep(ring, PROMPT, ())
    disks.persist(1)
    ring.send(Drop(1))
    disks.restart()
    yield disks
    disks.close()
    ring.send(*(Drop(prefix) for prefix in range(10, 20)))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit of the data": lambda path: flip(path, -1),
    "a flipped bit of the checksum": lambda path: flip(path, 9),
    "a flipped bit of the magic": lambda path: flip(path, 0),
    "a file cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "an empty file": lambda path: path.write_bytes(b""),
    "a missing file": lambda path: path.unlink(),
    "another cache's file": lambda path: path.write_bytes(path.with_name("r0").read_bytes()),
    "a link": lambda path: (path.rename(path.with_name("t")), path.symlink_to(path.with_name("t"))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_goes(kept: Disks, damage: str) -> None:
    path = next(p for p in kept.files() if p.name == "r1" and p.parent.name.startswith("00000016"))
    DAMAGE[damage](path)
    errors = kept.read(10, PROMPT[:40])
    assert [error and error.reason for error in errors].count("PREFIX_MISSING") == 1
    assert not path.exists()
    kept.ring.send(Drop(10))
    assert kept.read(11, PROMPT[:8]) == [None, None]
    check(kept.ring, 11, PROMPT[:8], ())
    kept.restart()
    assert {end for end, _ in set.intersection(*kept.told)} == {8}


def test_damaged_tokens_are_a_miss(kept: Disks) -> None:
    for path in kept.files():
        if path.name == "tokens" and path.parent.name.startswith("00000040"):
            flip(path, -1)
    assert [error and error.reason for error in kept.read(10, PROMPT[:40])] == ["PREFIX_MISSING"] * 2
    assert kept.read(11, PROMPT[:32]) == [None, None]


def test_nobody_else_and_no_other_edition_starts_from_it(kept: Disks) -> None:
    assert all(kept.told)
    assert [error and error.reason for error in kept.read(10, PROMPT[:40], OTHER)] == ["PREFIX_MISSING"] * 2
    kept.open("f" * 32)
    assert not any(kept.told)
    assert [error and error.reason for error in kept.read(11, PROMPT[:40])] == ["PREFIX_MISSING"] * 2
    kept.open()
    assert all(kept.told)


def test_the_files_of_an_owner_who_is_gone_are_deleted_before_anything_is_told(kept: Disks) -> None:
    kept.open(owners=(OTHER,))
    assert not any(kept.told)
    assert not kept.files()
    keep(kept.ring, PROMPT, ())
    kept.persist(1)
    kept.ring.send(Drop(1))
    assert not kept.files()


def test_a_dropped_prefix_is_neither_written_nor_read(kept: Disks) -> None:
    before = kept.files()
    keep(kept.ring, PROMPT[::-1], ())
    kept.ring.send(Persist(1, OWNER), Drop(1))
    kept.finish_writing()
    assert kept.files() == before
    kept.ring.send(Drop(12))
    assert [error and error.reason for error in kept.read(12, PROMPT[:40])] == ["ABORTED"] * 2
    assert all(stage.prefixes == 0 for stage in kept.ring.stages)


def test_a_longer_prefix_adds_only_what_is_new(kept: Disks) -> None:
    before = {path: path.stat().st_mtime_ns for path in kept.files()}
    keep(kept.ring, PROMPT + PROMPT, ())
    kept.persist(1)
    kept.ring.send(Drop(1))
    after = {path: path.stat().st_mtime_ns for path in kept.files()}
    assert before.items() <= after.items()
    assert {int(path.parent.name[:8]) for path in after.keys() - before.keys()} == {48, 56, 64, 72, 80}


def test_the_pieces_do_not_depend_on_the_cut(
    rings: Rings, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape], tmp_path: Path
) -> None:
    """Two stages write, three read: each has all files of its layers."""
    arch = "llama_sliding"
    disks = Disks(rings(arch), tmp_path)
    keep(disks.ring, PROMPT, (32,))
    disks.persist(1)
    disks.ring.send(Drop(1))
    disks.close()
    for source, target in ((0, 1), (1, 0), (0, 2), (1, 2)):
        shutil.copytree(tmp_path / str(source), tmp_path / str(target), dirs_exist_ok=True)
    disks = Disks(Ring(shape(arch), checkpoint(arch), 3), tmp_path)
    assert disks.read(10, PROMPT[:32]) == [None] * 3
    check(disks.ring, 10, PROMPT[:32], ())
    disks.close()


def test_what_is_read_can_be_quantized(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model", head_dim=64)
    ring = Ring(read_shape(folder, "llama", 300, kv_bits=8), folder, 2, kv_bits=8)
    disks = Disks(ring, tmp_path / "disks")
    keep(ring, PROMPT, (16,))
    disks.persist(1)
    ring.send(Drop(1))
    disks.restart()
    assert disks.read(10, PROMPT[:40]) == [None, None]
    check(ring, 10, PROMPT[:40], (16,))
    disks.close()
