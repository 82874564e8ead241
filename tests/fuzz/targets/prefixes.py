"""Fuzz target of a prefix's file on disk: its checksum, its header, and the caches that are built from it."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import msgpack
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache

from cluster.core.errors import MacpipeError, PrefixMissing
from cluster.core.prefix_keys import owner_key, pack_tokens
from cluster.model.caches import CacheLayout, SequenceCaches
from cluster.model.stored_caches import CacheBuilder, StoredPiece, take_rows, take_state
from cluster.worker.piece_file import pack_piece, read_piece
from cluster.worker.prefix_disk import _parse_piece
from cluster.worker.prefix_files import ROOT, Node, Place, PrefixFiles
from fuzz.mutation import by_tree
from fuzz.targets.kept import scratch
from fuzz.targets.target import Prepared, Target

TOKENS = 12
MAGIC, BODY = 8, 40
"""Where the checksum begins, and what it is of."""
LEAVES = ("0", "1", "2", "3")


def blank() -> SequenceCaches:
    return SequenceCaches(CacheLayout((0, 1, 2, 3), (), (0, 1, 2, 3)), [*new_caches()])


def new_caches() -> list[Any]:
    return [KVCache(), RotatingKVCache(max_size=8, keep=0), ArraysCache(2), KVCache()]


def filled() -> SequenceCaches:
    """Caches of the kinds that are stored differently: by rows, also quantized, and as a whole."""
    caches = blank()
    rows = mx.arange(2 * TOKENS * 64, dtype=mx.float32).reshape(1, 2, TOKENS, 64)
    plain, window, states, _ = (cache for _, cache in caches.named())
    plain.update_and_fetch(rows, rows)
    window.update_and_fetch(rows[..., :4], rows[..., :4])
    states[0], states[1] = rows[:, :, 0], rows[:, 0, :2]
    quantized = QuantizedKVCache(group_size=64, bits=8)
    quantized.update_and_fetch(rows, rows)
    caches.replace("3", quantized)
    return caches


def build(leaf: str, piece: StoredPiece, *, rows: bool) -> None:
    builder = CacheBuilder(blank())
    if rows:
        builder.add_rows(piece, TOKENS)
        builder.end_rows(leaf, TOKENS)
    else:
        builder.set_state(leaf, piece)
    mx.eval(builder.caches.copy().arrays())


def pieces() -> Prepared:
    files = PrefixFiles(scratch("prefixes"), 2**30)
    place = Place(owner_key("fuzz"), "0" * 32)
    files.keep_owners([], anonymous=True)
    node = files.add_node(place, b"n" * 16, ROOT, 0, tuple(range(TOKENS)))
    assert node
    path = files._path_of(node) / "r0"

    def packed(header: dict[str, Any], *parts: bytes) -> bytes:
        return b"".join(pack_piece(path, header, parts))

    def of_cache(piece: StoredPiece | None) -> bytes:
        assert piece
        data = [bytes(memoryview(tensor.data).cast("B")) for tensor in piece.tensors]
        forms = [[t.dtype, list(t.shape), len(d)] for t, d in zip(piece.tensors, data, strict=True)]
        return packed({"kind": piece.kind, "values": dict(piece.values), "tensors": forms}, *data)

    def run(data: bytes) -> None:
        whole = data[MAGIC:BODY] == hashlib.sha256(data[BODY:]).digest()
        path.write_bytes(data)
        path.with_name("tokens").write_bytes(data)
        try:
            read_all(files, node)
        finally:
            assert whole or misses(files, node), "a damaged file was taken"

    caches = filled()
    seeds = (
        packed({"start": 0}, pack_tokens(range(TOKENS))),
        *(of_cache(take_rows(caches, leaf, 0, TOKENS)) for leaf in ("0", "3")),
        *(of_cache(take_state(caches, leaf, 0, None)) for leaf in ("1", "2")),
    )
    return Prepared(run, seeds, by_tree(load, dump, sealed))


def misses(files: PrefixFiles, node: Node) -> bool:
    try:
        read_piece(files._path_of(node) / "r0")
    except PrefixMissing:
        return True
    return False


def read_all(files: PrefixFiles, node: Node) -> None:
    """Read the file as what it could be. Raise the last refusal if it is refused as everything."""
    refusals: list[MacpipeError] = []
    attempts = 0
    for leaf in LEAVES:
        for rows in (True, False):
            attempts += 1
            try:
                build(leaf, _parse_piece(files.read(node, "0", rows=True)), rows=rows)
            except MacpipeError as refused:
                refusals.append(refused)
    try:
        files.read_tokens(node)
    except MacpipeError as refused:
        refusals.append(refused)
    if len(refusals) > attempts:
        raise refusals[-1]


def load(data: bytes) -> Any:
    end = BODY + 4 + int.from_bytes(data[BODY : BODY + 4], "little")
    return [data[:MAGIC], msgpack.unpackb(data[BODY + 4 : end], strict_map_key=False), data[end:]]


def dump(tree: Any) -> bytes:
    header = bytes(msgpack.packb(tree[1]))
    magic, data = (tree[i] if isinstance(tree[i], bytes) else b"" for i in (0, 2))
    body = len(header).to_bytes(4, "little") + header + data
    return magic + hashlib.sha256(body).digest() + body


def sealed(data: bytes) -> bytes:
    """Return the bytes with a right checksum, two times in three."""
    return data[:MAGIC] + hashlib.sha256(data[BODY:]).digest() + data[BODY:] if len(data) % 3 else data


TARGETS = (Target("piece", 60, pieces),)
