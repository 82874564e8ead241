"""Cost targets of the network and the disk: announcements, names, keys, joining, peers' frames, and state files."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
from zeroconf import DNSIncoming

from cluster.coordinator.journal import Fsync, Journal
from cluster.coordinator.request_records import HEADER
from cluster.core.errors import MacpipeError
from cluster.core.journal_limits import JOURNAL_BYTES
from cluster.core.limits import KIB, MAX_FRAME_HEADER_BYTES
from cluster.core.request import Request, SamplingParams
from cluster.core.text import parse_layers
from cluster.joining.join_messages import read_refusal, read_reply, read_request
from cluster.security.authority import read_authority, read_request_key
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyStore
from cluster.security.limits import MAX_JOIN_BYTES, MAX_PEM_BYTES
from cluster.security.roles import read_party
from cluster.security.tokens import JoinToken
from cluster.wire.frame_codec import decode
from cluster.worker.inbox import Inbox
from fuzz.cost.recipe import Recipe, filled
from fuzz.cost.target import TAKEN, CostTarget, Entry
from fuzz.mutation import sealed_frame
from fuzz.targets.kept import scratch
from fuzz.targets.network import announcements

EPOCH = 7
MAX_PACKET_BYTES = 8966
"""A datagram of multicast DNS, by its standard; zeroconf reads no longer ones."""
NOW = 1e9


def _plain(read: Callable[[bytes], object], allowed: tuple[type[BaseException], ...] = (MacpipeError,)) -> Entry:
    """Return an entry that reads inputs on the event loop itself."""

    async def take(data: bytes) -> str:
        try:
            read(data)
        except allowed as e:
            return type(e).__name__
        return TAKEN

    return Entry(take)


def _on_a_thread(read: Callable[[bytes], object], allowed: tuple[type[BaseException], ...] = (MacpipeError,)) -> Entry:
    """Return an entry that reads inputs on a thread."""

    async def take(data: bytes) -> str:
        try:
            await anyio.to_thread.run_sync(read, data)
        except allowed as e:
            return type(e).__name__
        return TAKEN

    return Entry(take)


def _packets() -> Entry:
    def read(data: bytes) -> None:
        packet = DNSIncoming(data)
        assert packet.answers() is not None

    return _plain(read)


def _txt() -> Entry:
    decode_txt = announcements().decode
    return _plain(lambda data: decode_txt(data))


def _texts() -> Entry:
    """Return the entry of texts that people and strangers give: keys, tokens, layers."""
    keys = KeyStore(ClusterFolder(scratch("home"), "fuzz"))

    def read(data: bytes) -> None:
        text = data.decode("latin-1")
        keys.find(text)
        for parse in (JoinToken.parse, parse_layers):
            try:
                parse(text)
            except MacpipeError:
                continue

    return _plain(read)


def _asked_to_join() -> Entry:
    return _plain(lambda data: read_request(data).admission_request())


def _answered_to_join() -> Entry:
    def read(data: bytes) -> None:
        read_refusal(data)
        read_reply(data)

    return _plain(read, (MacpipeError, ValueError))


def _certificate() -> Entry:
    def read(data: bytes) -> None:
        for one in (read_party, read_request_key, read_authority):
            try:
                one(data)
            except (MacpipeError, ValueError):
                continue

    return _on_a_thread(read)


def _frames() -> Entry:
    """Return the entry of a worker's inbox. The header is the input, with a correct checksum."""

    def read(header: bytes) -> None:
        inbox = Inbox(EPOCH)
        inbox.put(sealed_frame(header, b""))
        while inbox.take():
            pass

    return _on_a_thread(read)


def _returned() -> Entry:
    """Return the entry of the last stage's frames, as the engine loop's thread reads them."""
    return _on_a_thread(lambda header: decode(sealed_frame(header, b"")))


def _of_file(path: Path, read: Callable[[], object]) -> Entry:
    def run(data: bytes) -> None:
        path.write_bytes(data)
        read()

    return _on_a_thread(run)


def _journal() -> Entry:
    """A journal of any bytes, read by a coordinator that starts."""
    path = scratch("journal")
    return _of_file(path, lambda: Journal(path, Fsync.NEVER, lambda: NOW + 1).close())


def _sealed_journal() -> Entry:
    """The same, where each record's length and checksum are right: the input is the record's payload."""
    path = scratch("journal")
    prefix = struct.Struct(">II")

    def read(data: bytes) -> None:
        path.write_bytes(HEADER + prefix.pack(len(data), zlib.crc32(data)) + data)
        Journal(path, Fsync.NEVER, lambda: NOW + 1).close()

    return _on_a_thread(read)


def _kept_journal() -> Entry:
    """A journal that a coordinator has written: the input says of how many requests, how long, with what answers."""
    path = scratch("journal")

    async def written(data: bytes) -> bool:
        return _written(path, data)

    async def take(data: bytes) -> str:
        await anyio.to_thread.run_sync(lambda: Journal(path, Fsync.NEVER, lambda: NOW + 1).close())
        return TAKEN

    return Entry(take, lets_in=written)


def _written(path: Path, data: bytes) -> bool:
    try:
        requests, prompt, samples, said = (min(max(0, int(n)), 10**7) for n in json.loads(data))
    except (ValueError, TypeError):
        return False
    path.unlink(missing_ok=True)
    journal = Journal(path, Fsync.NEVER, lambda: NOW)
    many = min(32, max(1, samples))
    for number in range(min(requests, 100_000)):
        if path.stat().st_size > JOURNAL_BYTES:
            break
        asked = Request(
            f"r{number}", (1,) * min(prompt, 4_000_000), SamplingParams(seed=5), 16, client="c", samples=many
        )
        journal.record_opened(asked, ())
        for token in range(min(said, 200_000)):
            journal.record_token(asked.id, token % 1000, token % many)
            if token % 1000 == 0:
                journal.flush()  # which keeps the file within its bound
        journal.flush()
    journal.close()
    return True


def _packet_seeds() -> Mapping[str, Recipe]:
    head = "000084000000ffff00000000"
    name = "056a6a6a6a6a00"
    chain = [["hex", f"c0{n:02x}"] for n in range(14, 250, 2)]
    long_name: Recipe = ["cat", ["rep", 60, ["hex", "3f" + "61" * 63]], ["hex", "00"]]
    return {
        "answers": ["cat", ["hex", head], ["rep", 400, ["hex", f"{name}00100001000000780004016100ff"]]],
        "pointers": ["cat", ["hex", head], ["rep", 1000, ["hex", "c00c"]]],
        "a chain of pointers": ["cat", ["hex", head], *chain, ["hex", name]],
        "labels": ["cat", ["hex", head], ["rep", 4000, ["hex", "0161"]], ["hex", "00"]],
        "pointed names": ["cat", ["hex", head], long_name, ["rep", 300, ["hex", "c00c000c0001000000780002c00c"]]],
        "questions": ["cat", ["hex", "00000000ffff000000000000"], ["rep", 800, ["hex", f"{name}000c0001"]]],
        "one long text": ["cat", ["hex", head + name + "00100001000000782000"], ["rep", 8192, ["hex", "00"]]],
        "NSEC": ["cat", ["hex", head], ["rep", 200, ["hex", f"{name}002f000100000078000a{name}0001ff"]]],
    }  # fmt: skip


def _frame_seeds() -> Mapping[str, Recipe]:
    most = MAX_FRAME_HEADER_BYTES

    def list_of(item: str, count: int) -> Recipe:
        return ["cat", ["hex", f"dd{count:08x}"], ["rep", count, ["hex", item]]]

    def header(edits: Recipe, samples: Recipe) -> Recipe:
        start = "9c" + "05" + "07" + "00" + "01"
        return ["cat", ["hex", start], edits, ["hex", "c0"], ["hex", "90"], samples, ["hex", "90c090c2"]]

    none: Recipe = ["hex", "90"]
    return {
        "lists": list_of("90", most - 8),
        "maps": list_of("80", most - 8),
        "numbers": list_of("01", most - 8),
        "floats": list_of("cb3ff0000000000000", (most - 8) // 9),
        "texts": list_of("a161", (most - 8) // 2),
        "empty texts": list_of("a0", most - 8),
        "depth": ["rep", most - 8, ["hex", "91"]],
        "edits": header(list_of("90", 4096), none),
        "many edits": header(list_of("90", most - 64), none),
        "samples": header(none, list_of("960101012bc090c2".replace("2bc0", "c0"), 400_000)),
        "samples of nothing": header(none, list_of("90", most - 64)),
        "samples with alternatives": header(
            none, list_of("9601010100" + "dc0014" + "9201cb3ff0000000000000" * 20 + "c2", 15_000)
        ),
        "no length": ["hex", "ddffffffff"],
        "long text": ["cat", ["hex", f"db{most - 16:08x}"], ["rep", most - 16, "a"]],
    }


def _journal_seeds() -> Mapping[str, Recipe]:
    most = 2 * JOURNAL_BYTES
    return {
        "lists": ["rep", most, ["hex", "90"]],
        "said of nobody": ["rep", most // 8, ["hex", "9401a16105009000"]],
        "ended": ["rep", most // 4, ["hex", "9302a161"]],
        "depth": ["rep", most, ["hex", "91"]],
        "one list": ["cat", ["hex", "dd01ffffff"], ["rep", most - 8, ["hex", "90"]]],
        "zeros": ["rep", most, ["hex", "00"]],
        "long text": ["cat", ["hex", "db01fffff0"], ["rep", most - 16, "a"]],
    }


def _kept_seeds() -> Mapping[str, Recipe]:
    return {
        "one long prompt": "[1,3000000,1,0]",
        "long prompts": "[4,1000000,1,0]",
        "many requests": "[60000,1,1,0]",
        "many tokens": "[8,1,1,200000]",
        "many samples": "[1000,1,32,500]",
    }


def _text_seeds(limit: int) -> Mapping[str, Recipe]:
    parts: Mapping[str, Recipe] = {
        "letters": ["rep", 1000, "a"],
        "a key": ["cat", "mpk_", ["rep", 1000, "a"]],
        "layers": ["rep", 1000, "0-1,"],
        "commas": ["rep", 1000, ","],
        "digits": ["rep", 1000, "9"],
        "dashes": ["rep", 1000, "-"],
        "a token": ["cat", "mpj_", ["rep", 1000, "a"]],
        "blanks": ["rep", 1000, " "],
        "quotes": ["cat", '{"name":"', ["rep", 1000, "\\u00e9"], '"}'],
        "unknown keys": ["cat", "{", ["each", 1000, '"', '":0,'], '"z":0}'],
        "lists": ["cat", '{"error":[', ["rep", 1000, "[],"], "[]]}"],
        "depth": ["nest", 1000, "[", "", "]"],
        "certificates": ["rep", 1000, "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"],
        "request": [
            "cat",
            "-----BEGIN CERTIFICATE REQUEST-----\n",
            ["rep", 1000, "MAAA"],
            "\n-----END CERTIFICATE REQUEST-----\n",
        ],
    }
    return {name: filled(recipe, limit) for name, recipe in parts.items()}


BYTES: tuple[Recipe, ...] = tuple(
    ["hex", one] for one in ("00", "ff", "90", "80", "c0", "c00c", "91", "a0", "dd0000ffff", "0161", "93a0a0a0")
)
LINES: tuple[Recipe, ...] = ("[", "]", "0,", '"a",', "\n", "{}", '["a","b"]\n')
TARGETS = (
    CostTarget("mdns-packet", "a datagram of 8,966 bytes", MAX_PACKET_BYTES, 64, _packets, _packet_seeds, BYTES),
    CostTarget(
        "mdns-record",
        "the same",
        MAX_PACKET_BYTES,
        64,
        _txt,
        lambda: {
            "zeros": ["rep", 8000, ["hex", "00"]],
            "pairs": ["rep", 2000, ["hex", "03613d61"]],
            **_text_seeds(MAX_PACKET_BYTES),
        },
        BYTES,
    ),
    CostTarget("names", "64 KiB of a head", 64 * KIB, 16, _texts, lambda: _text_seeds(64 * KIB), LINES),
    CostTarget(
        "join-answer", "64 KiB", MAX_JOIN_BYTES, 1, _answered_to_join, lambda: _text_seeds(MAX_JOIN_BYTES), LINES
    ),
    CostTarget("join", "64 KiB", MAX_JOIN_BYTES, 32, _asked_to_join, lambda: _text_seeds(MAX_JOIN_BYTES), LINES),
    CostTarget("certificate", "16 KiB", MAX_PEM_BYTES, 32, _certificate, lambda: _text_seeds(MAX_PEM_BYTES), LINES),
    CostTarget("frame", "a header of 4 MiB", MAX_FRAME_HEADER_BYTES, 2, _frames, _frame_seeds, BYTES),
    CostTarget("frame-returned", "a header of 4 MiB", MAX_FRAME_HEADER_BYTES, 1, _returned, _frame_seeds, BYTES),
    CostTarget("journal", "32 MiB", 2 * JOURNAL_BYTES, 1, _journal, _journal_seeds, BYTES),
    CostTarget("journal-record", "32 MiB", 2 * JOURNAL_BYTES, 1, _sealed_journal, _journal_seeds, BYTES),
    CostTarget("journal-kept", "32 MiB as written", KIB, 1, _kept_journal, _kept_seeds, ("[9,9,9,9]", "0", "9", ",")),
)
