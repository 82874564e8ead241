"""Fuzz targets of a model from a folder, a peer or the hub: headers, configs, tokenizers, grammars, answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import copy
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import httpx2
from google.protobuf.message import DecodeError
from mlx_lm import tool_parsers

from cluster.codec.examination import decode_results
from cluster.codec.stored_models import decode_worker_store
from cluster.codec.worker_info import decode_info
from cluster.core.errors import MacpipeError
from cluster.core.request import Grammar, GrammarKind, Parsing, Tool
from cluster.model.answer_parser import AnswerParser, read_calls
from cluster.model.checkpoint import BUNDLED, open_checkpoint
from cluster.model.safetensors import read_shard
from cluster.model.skeleton import open_skeleton
from cluster.model.tokenizer import load_tokenizer
from cluster.store.hub import Hub, HubName, look_up
from cluster.store.partial_checkpoint import place
from cluster.store.peer_client import Peer
from cluster.v1 import cluster_pb2, store_pb2, worker_pb2
from fuzz.mutation import apart, joined, spoil_bytes, spoil_json, spoil_parts, spoil_proto
from fuzz.targets.asked import served
from fuzz.targets.kept import scratch
from fuzz.targets.target import Prepared, Target, prepare_message

LONGEST_ANSWER = 1_500
"""One of mlx-lm's parsers (minicpm5) takes time that grows with the square of a text without blanks."""
SMALL = BUNDLED / "faq-draft"
SIZE = (SMALL / "model.safetensors").stat().st_size


def _folder() -> Path:
    """A copy of the small model, without its weights' bytes: the header, and a hole for the rest."""
    folder = scratch("model")
    shutil.copytree(SMALL, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    with weights.open("r+b") as file:
        file.truncate(8 + int.from_bytes(data[:8], "little"))
        file.truncate(len(data))
    return folder


def _header() -> bytes:
    data = (SMALL / "model.safetensors").read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def headers() -> Prepared:
    path = scratch("model.safetensors")
    tensors = {
        "__metadata__": {"format": "mlx"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for tensor in read_shard(path).tensors:
            assert 0 <= tensor.offset <= tensor.end <= len(data)

    text = json.dumps(tensors).encode()
    return Prepared(run, (len(text).to_bytes(8, "little") + text + bytes(26),), _spoil_header)


def _spoil_header(data: bytes, rng: Any, others: Any) -> bytes:
    if rng.random() < 0.2:
        return spoil_bytes(data, rng, others)
    length = int.from_bytes(data[:8], "little")
    text = spoil_json(data[8 : 8 + length], rng, [])
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _of_folder(name: str, read: Callable[[Path], object], *, also: str = "") -> Callable[[], Prepared]:
    """Damage one file of a folder and read the folder."""

    def prepare() -> Prepared:
        folder = _folder()
        file = folder / name
        seeds = [file.read_bytes()] if file.is_file() else [also.encode()]

        def run(data: bytes) -> None:
            file.write_bytes(data)
            read(folder)

        return Prepared(run, tuple(seeds), spoil_json)

    return prepare


INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}})


def _tokenized(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in ("hello world", "é😀\0"):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids[:5])


def hub_answers() -> Prepared:
    """Read the hub's description of a model, then its small files."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    answers: list[tuple[int, bytes]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked = "fuzz/model" in request.url.path  # a thread of another test may still ask for its own model
        status, body = answers.pop(0) if asked and answers else (404, b"")
        return httpx2.Response(status, content=body, headers={"content-type": "application/json"})

    models = scratch("models")

    def run(data: bytes) -> None:
        answers[:] = [(200 + part[0] if part[:1] < b"\x08" else 206, part[1:]) for part in apart(data) if part]
        set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
        try:
            origin = look_up(HubName("fuzz/model"))
            place(models, origin, Hub("fuzz/model", origin.commit).small)
        finally:
            set_client_factory(default_client_factory)
            shutil.rmtree(models, ignore_errors=True)

    config, header = b'{"model_type":"llama"}', _header()
    siblings = [
        {"rfilename": "config.json", "size": len(config), "blobId": ""},
        {"rfilename": "model.safetensors", "size": SIZE, "lfs": {"sha256": "ab" * 32, "size": SIZE, "pointerSize": 1}},
        {"rfilename": "../evil.json", "size": 3},
    ]
    info = json.dumps({"id": "fuzz/model", "sha": "c0ffee", "siblings": siblings}).encode()
    said = joined([b"\0" + info, b"\x08" + config, b"\x08" + header[:8], b"\x08" + header[8:]])
    return Prepared(run, (said,), spoil_parts(lambda part, rng, others: part[:1] + spoil_json(part[1:], rng, [])))


class _Stub:
    """A store that answers with whatever is to be tried."""

    def __init__(self, data: list[bytes]) -> None:
        self._data = data

    def DescribeModel(self, request: object, timeout: float) -> store_pb2.DescribeModelResponse:
        return store_pb2.DescribeModelResponse.FromString(self._data.pop(0) if self._data else b"")

    def ListTensors(self, request: object, timeout: float) -> list[store_pb2.ListTensorsResponse]:
        return [store_pb2.ListTensorsResponse.FromString(self._data.pop(0) if self._data else b"")]

    def ReadFile(self, request: object, timeout: float) -> list[store_pb2.ReadFileResponse]:
        return [store_pb2.ReadFileResponse.FromString(self._data.pop(0) if self._data else b"")]


def peers() -> Prepared:
    """Read another worker's store: states of tensors, files, and their bytes."""
    models = scratch("models")

    def run(data: bytes) -> None:
        peer = Peer.__new__(Peer)
        peer.address, peer.label, peer._fingerprint = "127.0.0.1:1", "worker a", "ab" * 32
        peer._stub = _Stub(apart(data))  # type: ignore[assignment]
        for digest in peer.holdings(("t",)).digests.values():
            bytes.fromhex(digest)
        try:
            place(models, peer.describe(), peer.small)
        finally:
            shutil.rmtree(models, ignore_errors=True)

    tensors = store_pb2.ListTensorsResponse(
        tensors=[
            store_pb2.TensorState(name="t", presence=store_pb2.PRESENCE_HERE, sha256=bytes(32)),
            store_pb2.TensorState(name="u", presence=store_pb2.PRESENCE_COMING),
        ]
    )
    files = store_pb2.DescribeModelResponse(
        files=[
            store_pb2.StoredFile(name="config.json", size=2),
            store_pb2.StoredFile(name="model.safetensors", size=SIZE),
        ],
        repo="o/n",
        commit="c0ffee",
    )
    parts = [tensors, files, store_pb2.ReadFileResponse(data=b"{}"), store_pb2.ReadFileResponse(data=_header())]
    seed = joined([part.SerializeToString() for part in parts])
    return Prepared(run, (seed,), spoil_parts(spoil_proto), (MacpipeError, DecodeError))


def facts() -> Prepared:
    """Read a worker's description of itself."""
    said = worker_pb2.DescribeResponse(
        id="ab" * 8, name="mac-1", version="1", cluster="c", data_port=7000, memory_total=2**36, memory_limit=2**35,
        epoch=3, start_layer=0, end_layer=4, model="m", adapters=["legal@" + "ab" * 32],
        data_hosts=["10.0.0.5", "fd00::5"],
        slices=[
            worker_pb2.HeldSlice(
                epoch=3, end_layer=4, model="m", adapters=["legal@" + "ab" * 32], data_port=7001, memory_limit=9
            )
        ],
        profile=worker_pb2.Profile(
            bandwidth=1e11,
            layer_s=1e-5,
            step_s=1e-4,
            flops=1e12,
            verify_costs=[worker_pb2.VerifyCost(tokens=2, cost=1.1)],
        ),
    )  # fmt: skip
    return prepare_message(worker_pb2.DescribeResponse, lambda told: decode_info(told, "10.0.0.5:7000", 0.0), said)


def findings() -> Prepared:
    """Read what a worker found on its Mac."""
    finding = cluster_pb2.Finding(severity=cluster_pb2.FINDING_SEVERITY_NOTE, what="a VPN is connected", why="w")
    results = [cluster_pb2.CheckResult(check="VPN", findings=[finding]), cluster_pb2.CheckResult(unknown=True)]
    seed = worker_pb2.ExamineResponse(results=results)
    return prepare_message(worker_pb2.ExamineResponse, lambda answer: decode_results(answer.results, "mac-1"), seed)


def stored() -> Prepared:
    """Read which models a worker has in its store."""
    spans = [cluster_pb2.LayerSpan(start=0, end=2), cluster_pb2.LayerSpan(start=4, end=6)]
    model = cluster_pb2.StoredModel(fingerprint="ab" * 32, names=["o/n"], disk_bytes=9, layers=spans, last_used=1e9)
    store = cluster_pb2.MacStore(folder="/models", id="cd" * 8, models=[model])
    seed = worker_pb2.ListStoredResponse(store=store)
    return prepare_message(worker_pb2.ListStoredResponse, lambda told: decode_worker_store(told.store, "mac-1"), seed)


def _grammar(kind: GrammarKind, *seeds: str) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        tokenizer = served().tokenizer
        tokenizer.grammars()

        def run(data: bytes) -> None:
            tokenizer.check_grammar(Grammar(kind, data.decode("utf-8", "replace")))

        spoil = spoil_json if kind is GrammarKind.JSON_SCHEMA else spoil_bytes
        return Prepared(run, tuple(seed.encode() for seed in seeds), spoil)

    return prepare


def answers() -> Prepared:
    """Parse a model's text, which may be anything, into reasoning, content and calls, in every known format."""
    formats = [import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call for name in FORMATS]
    marks = served().tokenizer._markers
    marks = copy(marks)
    marks.think_start, marks.think_end, marks.call_start, marks.call_end = (
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
    )
    tools = (Tool("f", "d", '{"type":"object","properties":{"x":{"type":"integer"}}}'),)

    def read(parser: AnswerParser) -> None:
        while (body := parser.unread_calls) is not None:
            parser.add_calls(read_calls(body, marks, tools))

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")[:LONGEST_ANSWER]
        for number, parse in enumerate(formats):
            marks.parse = parse
            parser = AnswerParser(marks, Parsing(tools, thinking=number % 2 == 1))
            for at in range(0, len(text), 7):
                parser.add(text[at : at + 7])
                read(parser)
            parser.flush(whole=True)
            read(parser)

    said = b'<think>so</think>hello <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    return Prepared(run, (said, b"f(x=1)", b"[f(x=[1,{}])]"), spoil_bytes)


SCHEMA = (
    '{"type":"object","properties":{"a":{"type":"string","pattern":"^[a-z]+$"},"b":{"enum":[1,2]}},"required":["a"]}'
)
LARK = 'start: WORD (" " WORD)*\nWORD: /[a-z]+/\n'
CONFIG = "config.json"
FORMATS = tuple(sorted(module.name for module in iter_modules(tool_parsers.__path__)))

TARGETS = (
    Target("safetensors", 150, headers),
    Target("config", 10, _of_folder(CONFIG, open_checkpoint)),
    Target("index", 10, _of_folder("model.safetensors.index.json", open_checkpoint, also=INDEX)),
    Target("skeleton", 3, _of_folder(CONFIG, lambda folder: open_checkpoint(folder) and open_skeleton(folder))),
    Target("tokenizer", 1, _of_folder("tokenizer.json", _tokenized)),
    Target("tokenizer-config", 1, _of_folder("tokenizer_config.json", _tokenized)),
    Target("generation-config", 1, _of_folder("generation_config.json", _tokenized, also='{"eos_token_id": [0, 1]}')),
    Target("hub", 4, hub_answers),
    Target("peer", 8, peers),
    Target("facts", 80, facts),
    Target("findings", 40, findings),
    Target("stored", 40, stored),
    Target("schema", 8, _grammar(GrammarKind.JSON_SCHEMA, SCHEMA)),
    Target("regex", 8, _grammar(GrammarKind.REGEX, "(a|b)+[0-9]{2,5}x?")),
    Target("lark", 4, _grammar(GrammarKind.LARK, LARK)),
    Target("answer", 6, answers),
)
