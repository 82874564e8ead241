"""Fuzz targets of files that a crash, a full disk or a person may have damaged, and of an engine's pipe.

A damaged file is never an error: it is used as far as it can be read.
"""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import msgpack

from cluster.coordinator import journal as coordinator_journal
from cluster.coordinator.request_records import HEADER, as_data, pack_record, read_records
from cluster.core.errors import Reason
from cluster.core.plan import Link, Profile
from cluster.core.request import Grammar, GrammarKind, Request, SamplingParams
from cluster.sandbox.job_messages import HEADER as SANDBOX_HEADER
from cluster.sandbox.job_messages import JobFailed as SandboxFailed
from cluster.sandbox.job_messages import PromptReply, Ready, pack_reply, pack_tokens, payload_size, unpack_reply
from cluster.sandbox.sandboxed_tokenizer import convert_reply
from cluster.store.digest_manifest import DigestManifest
from cluster.store.partial_checkpoint import PartialCheckpoint, place
from cluster.store.quantized_copy import read_map
from cluster.worker import pipe_messages as messages
from cluster.worker import profile_file as profiles
from fuzz.mutation import by_tree, spoil_bytes, spoil_json, spoil_lines, spoil_records
from fuzz.targets.target import Prepared, Target


def scratch(name: str) -> Path:
    """Return a path for a file, in memory if possible; it is removed when the process ends."""
    fast = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="macpipe-fuzz-", dir=fast if fast.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / name


def _of_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return run


def engine_messages() -> Prepared:
    def run(data: bytes) -> None:
        stream = messages.unpacker()
        for at in range(0, len(data), 4096):
            for message in messages.read(stream, data[at : at + 4096]):
                assert messages.pack(message)

    said = (
        messages.Load(1, 7, 0, 2, "m", "/m", "ab" * 32, 0, 4, 4096, 8),
        messages.LinkStage(2, 7, "127.0.0.1:7000", "ab" * 8),
        messages.HoldGroupPort(2),
        messages.JoinGroup(2, 1, ("127.0.0.1:7001", "127.0.0.1:7002"), "ring"),
        messages.JoinGroup(2, 1, ("10.0.0.1:7001", "10.0.0.2:7002"), "jaccl", ("", "rdma_en5", "rdma_en4", "")),
        messages.MeasureSums(2),
        messages.SumsMeasured(2, 5e-5, 1e8, False),
        messages.GroupPortHeld(3, 7001),
        messages.LayOutCopy(8, "/models", "ab" * 32, "/m", 4, "m"),
        messages.QuantizeLayers(9, "/models", "ab" * 32, "/m", 4, 0, 4),
        messages.Unload(3, 7),
        messages.SetAdapters(6, 7, ("legal",), ("/legal",), ("ab" * 32,)),
        messages.GetReport(4),
        messages.Measure(5),
        messages.OpenPrefixes(6, 7, "ab" * 16, "key-ab\nopen-cd", True),
        messages.ReadPrefix(7, 7, 3, "key-ab", "", b"n" * 16, 512),
        messages.PrefixesOpened(6, b"n" * 16 + bytes(4)),
        messages.Hello(7000, "M3", "metal", "0.32", "0.32", 2**36, 2**35),
        messages.Progress(1, 5, 10),
        messages.Done(1),
        messages.CommandFailed(1, "BAD_CHECKPOINT", "no"),
        messages.Reported(4, 1, 2, 3, 4, data_hosts=("10.0.0.5",)),
        messages.Measured(5, 1e11, 1e-5, 1e-4, 1e12, 0.1, (1.1, 0.0, 1.3), "the machine is hot"),
    )
    return Prepared(run, (b"".join(map(messages.pack, said)), *map(messages.pack, said)), spoil_records)


def sandbox_messages() -> Prepared:
    """Read what a sandbox process could answer after a hostile model has damaged it."""

    def run(data: bytes) -> None:
        size = SANDBOX_HEADER.size
        payload_size(data[:size].ljust(size, b"\0"))
        reply = unpack_reply(data[size:])
        if isinstance(reply, PromptReply):
            convert_reply(reply)

    grammar = Grammar(GrammarKind.REGEX, "a+", (1, 2))
    prompt = PromptReply(2, pack_tokens((1, 2)), ("a", "b"), True, grammar, (1,), (-1, 2**40))
    replies = (Ready(), prompt, SandboxFailed(Reason.BUSY, "no", ""))
    return Prepared(run, tuple(map(pack_reply, replies)), spoil_bytes)


def coordinator_journals() -> Prepared:
    plain = Request("a", (1, 2, 3), SamplingParams(seed=5, logit_bias=((3, 1.0),)), 16, ("stop",), False, None, "c", 3)
    adapted = replace(plain, id="b", adapter="legal@" + "ab" * 32)
    kept = [coordinator_journal.JournaledRequest(request, 1e9, [[4, 5]]) for request in (plain, adapted)]
    old = [msgpack.packb((0, "a", 1e9, as_data(plain), [[4, 5]])), msgpack.packb((1, "a", 6)), msgpack.packb((2, "a"))]
    new = [HEADER, *map(coordinator_journal._pack_opened, kept), pack_record(1, "a", 6, 0), pack_record(2, "a")]
    parked = [
        HEADER,
        coordinator_journal._pack_opened(
            coordinator_journal.JournaledRequest(replace(plain, resumable=True), 1e9, [[4]])
        ),
        pack_record(5, "a", 1e9),
        pack_record(6, "", [("b", "c", 1e9)]),
    ]
    path = scratch("journal")

    def read(path: Path) -> None:
        now = 1e9 + 1
        journal = coordinator_journal.Journal(path, coordinator_journal.Fsync.NEVER, lambda: now)
        journal.take("a", "c")
        journal.has_ended("b", "c")
        journal.close()

    def load(data: bytes) -> list[object]:
        return list(read_records(io.BytesIO(data)))

    def dump(records: list[object]) -> bytes:
        return HEADER + b"".join(pack_record(*r) if isinstance(r, list) else pack_record(r) for r in records)

    seeds = tuple(b"".join(records) for records in (old, old[:2], new, new[:3], parked))
    return Prepared(_of_file(path, read), seeds, by_tree(load, dump), ())


def worker_profiles() -> Prepared:
    known = Profile(1e11, 1e-5, 1e-4, 1e12, 0.1, (("ab" * 32, 1.1),), ((2, 1.1), (8, 2.0)))
    kept = profiles.StoredProfile("k", known, (("w 10.0.0.1", Link(0.001, 1e8, "en0"), 1e9),))

    def read(path: Path) -> None:
        file = profiles.ProfileFile(path, "k", lambda: 1e9 + 1)
        link = file.link("w", "10.0.0.1:7000")
        assert link is None or link.hop_s(1) >= 0
        assert file.kept.profile.correction("none") > 0

    return Prepared(_of_file(scratch("profile.json"), read), (json.dumps(asdict(kept)).encode(),), spoil_json, ())


def manifests() -> Prepared:
    path = scratch("home") / "manifests" / "ab.jsonl"
    path.parent.mkdir(parents=True)
    lines = b'["t.weight","' + b"ab" * 32 + b'"]\n["u.weight","' + b"cd" * 32 + b'"]\n["u.weight",""]\n'

    def read(path: Path) -> None:
        for digest in DigestManifest(path.parent.parent, "ab").known.values():
            bytes.fromhex(digest)  # what the store server makes of it

    return Prepared(_of_file(path, read), (lines,), spoil_lines, ())


def tensor_maps() -> Prepared:
    """Read the record of the tensors that each layer of a quantized copy needs."""

    def read(path: Path) -> None:
        if found := read_map(path):
            assert all(isinstance(name, str) for name in found.names)

    kept = {"layers": [["a.0.w"], ["a.1.w", "a.1.s"]], "shared": [{"tensors": ["e.w"], "layers": [0, 1]}]}
    return Prepared(_of_file(scratch("tensor_map.json"), read), (json.dumps(kept).encode(),), spoil_json, ())


def partials() -> Prepared:
    """Read the records of a partial checkpoint: its journal and its origin."""
    from cluster.model.checkpoint import BUNDLED
    from cluster.model.weight_versions import RECORDS
    from cluster.store.model_files import ModelFiles, StoredFile

    source = BUNDLED / "faq-draft"
    files = tuple(
        StoredFile(f.name, f.stat().st_size) for f in sorted(source.iterdir()) if f.suffix in (".json", ".safetensors")
    )

    def read_small(file: StoredFile) -> bytes:
        data = (source / file.name).read_bytes()
        return data[: 8 + int.from_bytes(data[:8], "little")] if file.weights else data

    folder = place(scratch("models"), ModelFiles(files, "o/n", "c0ffee"), read_small)
    journal, origin = folder / RECORDS / "journal.jsonl", folder / RECORDS / "origin.json"
    tensor = next(iter(PartialCheckpoint(folder).tensors.values()))
    sizes = (folder / tensor.file).stat()
    lines = [
        ["got", tensor.file, 0, sizes.st_size],
        ["lost", tensor.file, tensor.offset, tensor.end],
        ["sum", tensor.name, "ab" * 32],
        ["whole", tensor.file, "cd" * 32],
        ["stat", tensor.file, sizes.st_size, sizes.st_mtime_ns],
    ]
    kept_journal, kept_origin = journal.read_bytes(), origin.read_bytes()

    def run(data: bytes) -> None:
        about_origin, _, rest = data.partition(b"\n\n")
        journal.write_bytes(rest or kept_journal)
        origin.write_bytes(about_origin or kept_origin)
        part = PartialCheckpoint(folder)
        part.missing_bytes(tensor)
        part.unproved_files()
        assert all(bytes.fromhex(digest) for digest in part.verified.values())

    text = b"\n".join(json.dumps(line).encode() for line in lines)
    return Prepared(run, (b"\n\n" + text, kept_origin + b"\n\n", kept_origin + b"\n\n" + text), spoil_bytes)


def held_ids() -> Prepared:
    from cluster.platform.paths import hold_id

    folder = scratch("id")
    folder.mkdir()

    def read(path: Path) -> None:
        with hold_id(path.parent) as known:
            assert known.isalnum()
            assert known.isascii()

    return Prepared(_of_file(folder / "id", read), (b"0123456789abcdef\n", b""), spoil_bytes, ())


TARGETS = (
    Target("engine", 200, engine_messages),
    Target("sandbox", 200, sandbox_messages),
    Target("journal", 30, coordinator_journals),
    Target("profile", 100, worker_profiles),
    Target("manifest", 80, manifests),
    Target("tensor-map", 100, tensor_maps),
    Target("partial", 4, partials),
    Target("id", 30, held_ids),
)
