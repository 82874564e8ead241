"""Cost targets of gRPC: each request of each service, parsed and handled; and workers' answers to a coordinator.

The seeds are derived from the messages' descriptors: for each field as much as fits. A new method needs only a
stand-in here for what is behind its servicer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError

from cluster.api.grpc.cluster_service import ClusterServicer
from cluster.api.grpc.inference_service import InferenceServicer
from cluster.codec.worker_info import decode_info
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import MacpipeError
from cluster.core.limits import MAX_ANSWER_BYTES, MAX_CONTROL_BYTES, MAX_MESSAGES, MAX_SCHEMA_BYTES, MIB
from cluster.platform.macos import MachineFacts
from cluster.security.credentials import LocalTrust
from cluster.store.store import Store
from cluster.store.store_server import StoreServer
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.grpc_setup import control_bounds
from cluster.transport.message_bounds import MessageBounds
from cluster.v1 import cluster_pb2, inference_pb2, store_pb2, worker_pb2
from cluster.v1.cluster_pb2_grpc import add_ClusterServiceServicer_to_server
from cluster.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from cluster.v1.store_pb2_grpc import add_StoreServiceServicer_to_server
from cluster.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from cluster.worker.engine_launcher import EngineLauncher
from cluster.worker.engine_slots import EngineSlots
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import WorkerSettings
from cluster.worker.worker_service import WorkerServicer
from fuzz.cost.recipe import Recipe, filled, varint
from fuzz.cost.stand_in import PASSED, Aborted, Context, Passed, model_folder, outcome_of, request_service
from fuzz.cost.target import SANDBOX_CLOSED, TAKEN, CostTarget, Entry, job_limit
from fuzz.targets.kept import scratch

AT_ONCE = 16
PUBLIC = tuple(s for f in (inference_pb2, cluster_pb2) for s in f.DESCRIPTOR.services_by_name.values())
"""Services that clients call."""
FILES = (inference_pb2, cluster_pb2, worker_pb2, store_pb2)
DEPTH = 3
"""Messages within messages that the seeds go down."""
UNKNOWN = 9999
"""No message has a field of this number."""
ATOMS: tuple[Recipe, ...] = (
    *(["hex", digits] for digits in ("0a00", "1200", "1a00", "2200", "0801", "1001", "ff", "00", "0b0c", "0a020800")),
    *(["msg", number, "a"] for number in range(1, 8)),
    ["rep", 1000, "a"],
    ["rep", 1000, ["hex", "0a00"]],
    ["ints", 1000, 1, 1],
)


class _Methods:
    """Replaces a server, and keeps the handlers that are added to it."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.found |= handlers


class _Nothing:
    """An empty supervisor, stage loader or group of Macs: every call raises ``Passed``."""

    hello = None
    computing = False
    store_server = SimpleNamespace(release=lambda: None)

    async def report(self) -> None:
        raise Passed(PASSED)

    async def ask(self, *given: object) -> None:
        raise Passed(PASSED)

    async def examine(self, *given: object) -> None:
        raise Passed(PASSED)

    async def run(self) -> None:
        raise Passed(PASSED)

    async def list_stores(self) -> None:
        raise Passed(PASSED)

    async def remove(self, *given: object) -> None:
        raise Passed(PASSED)

    def reset(self, why: str) -> None: ...

    async def stage(self, *given: object) -> Any:
        raise Passed(PASSED)
        yield


def _public(methods: _Methods) -> None:
    trust = LocalTrust()
    add_InferenceServiceServicer_to_server(InferenceServicer(request_service(), trust), methods)  # type: ignore[arg-type]
    nothing: Any = _Nothing()
    servicer = ClusterServicer(request_service().coordinator, trust, LoadOrder("faq"), nothing, nothing)
    add_ClusterServiceServicer_to_server(servicer, methods)  # type: ignore[arg-type]


def _worker(methods: _Methods) -> None:
    nothing: Any = _Nothing()
    home = scratch("home")
    slots = EngineSlots(EngineLauncher([]))
    slots.first.supervisor = nothing
    control = WorkerServicer(
        id="ab" * 8,
        settings=WorkerSettings(name="fuzz", home=home),
        trust=LocalTrust(),
        slots=slots,
        loader=nothing,
        file=ProfileFile(scratch("profile.json"), "k"),
        machine=MachineFacts(),
    )
    control._examiner = nothing  # it would start a process
    add_WorkerServiceServicer_to_server(control, methods)  # type: ignore[arg-type]


def _store(methods: _Methods) -> None:
    store_server = StoreServer(Store(scratch("home")))
    store_server.share(model_folder(), None)
    add_StoreServiceServicer_to_server(store_server, methods)  # type: ignore[arg-type]


SERVICES: Mapping[str, Callable[[_Methods], None]] = {
    "InferenceService": _public,
    "ClusterService": _public,
    "WorkerService": _worker,
    "StoreService": _store,
}


def _entry(service: ServiceDescriptor, method: str) -> Entry:
    methods = _Methods()
    SERVICES[service.name](methods)
    public = MessageBounds(PUBLIC, ByteBudget(), lambda context: context.peer())
    bounds = public if service in PUBLIC else control_bounds(LocalTrust())
    details: Any = SimpleNamespace(method=f"/{service.full_name}/{method}")

    async def known(details: object) -> Any:
        return methods.found[method]

    async def take(data: bytes) -> str:
        handler = await bounds.intercept_service(known, details)
        try:
            request = handler.request_deserializer(data) if handler.request_deserializer else data
            if handler.response_streaming:
                async for reply in handler.unary_stream(request, Context()):
                    handler.response_serializer(reply)
            else:
                handler.response_serializer(await handler.unary_unary(request, Context()))
        except Aborted as e:
            if SANDBOX_CLOSED in e.details:
                return SANDBOX_CLOSED
            return TAKEN if PASSED in e.details else e.code.name
        except DecodeError:
            return "no message"
        except MacpipeError as e:
            return f"!! {outcome_of(e)} was not told to the caller"
        return TAKEN

    return Entry(take)


def _facts_entry() -> Entry:
    async def take(data: bytes) -> str:
        try:
            decode_info(worker_pb2.DescribeResponse.FromString(data), "10.0.0.5:7000", 0.0)
        except MacpipeError as e:
            return outcome_of(e)
        except DecodeError:
            return "no message"
        return TAKEN

    return Entry(take)


def seeds_of(kind: Descriptor, limit: int = MAX_CONTROL_BYTES) -> Mapping[str, Recipe]:
    """Return seeds with as much as allowed in each field of a message and its submessages, and with unknown fields."""
    made: dict[str, Recipe] = {
        "unknown fields": ["rep", 1000, ["hex", (varint(UNKNOWN << 3) + b"\0").hex()]],
        "unknown text": ["msg", UNKNOWN, ["rep", 1000, "a"]],
        "unknown groups": [
            "nest",
            90,
            ["hex", varint(UNKNOWN << 3 | 3).hex()],
            "",
            ["hex", varint(UNKNOWN << 3 | 4).hex()],
        ],
        "no message": ["rep", 1000, ["hex", "ff"]],
    }
    made |= dict(_fields(kind, DEPTH))
    return {name: filled(recipe, limit) for name, recipe in made.items()}


def _fields(kind: Descriptor, depth: int) -> Iterator[tuple[str, Recipe]]:
    for field in kind.fields:
        empty = ["hex", (varint(field.number << 3 | 2) + b"\0").hex()]
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            yield f"{field.name} of nothing", ["rep", 1000, empty]
            yield f"{field.name} with numbers", ["ints", 1000, field.number, 1]
            if depth:
                for name, inner in _fields(field.message_type, depth - 1):
                    yield f"{field.name}.{name}", ["msg", field.number, inner]
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            yield f"{field.name} as text", ["msg", field.number, ["rep", 1000, "a"]]
            yield f"{field.name} again", ["rep", 1000, ["msg", field.number, "a"]]
            if field.is_repeated:
                yield f"{field.name} of nothing", ["rep", 1000, empty]
        elif field.is_repeated:
            yield f"{field.name} packed", ["msg", field.number, ["rep", 1000, ["hex", "01"]]]
            yield f"{field.name} apart", ["rep", 1000, ["int", field.number, 1]]


def _turn(text: Recipe) -> Recipe:
    return ["msg", 1, ["cat", ["msg", 1, "user"], ["msg", 2, text]]]


def _field(kind: Any, name: str) -> int:
    return int(kind.DESCRIPTOR.fields_by_name[name].number)


def _more(method: str) -> Mapping[str, Recipe]:
    """Return acceptable requests, with as much of everything as is allowed."""
    text: Recipe = ["rep", 4 * MIB, "a"]
    if method == "Generate":
        kind = inference_pb2.GenerateRequest
        ids, grammar = _field(kind, "tokens"), _field(kind, "grammar")
        prompt: Recipe = ["msg", _field(kind, "text"), "a"]
        schema = _field(inference_pb2.Grammar, "json_schema")
        return {
            "whole text": ["msg", _field(kind, "text"), text],
            "whole ids": ["msg", ids, ["msg", 1, ["rep", 15 * MIB, ["hex", "01"]]]],
            "whole schema": [
                "cat",
                prompt,
                ["msg", grammar, ["msg", schema, ["cat", '{"enum":[', ["each", 6000, '"', '",'], '"z"]}']]],
            ],
            "whole long schema": ["cat", prompt, ["msg", grammar, ["msg", schema, ["rep", 15 * MIB, " "]]]],
            "whole multiple": [
                "cat",
                prompt,
                ["msg", grammar, ["msg", schema, '{"type":"integer","multipleOf":999983}']],
            ],
            "whole regex": [
                "cat",
                prompt,
                ["msg", grammar, ["msg", _field(inference_pb2.Grammar, "regex"), ["rep", MAX_SCHEMA_BYTES, "a"]]],
            ],
        }
    if method in ("Chat", "Tokenize"):
        kind = inference_pb2.ChatRequest if method == "Chat" else inference_pb2.TokenizeRequest
        number = _field(kind, "messages")
        role, content = _field(inference_pb2.ChatMessage, "role"), _field(inference_pb2.ChatMessage, "content")

        def turn(said: Recipe) -> Recipe:
            return ["msg", number, ["cat", ["msg", role, "user"], ["msg", content, said]]]

        template, tools = _field(kind, "template"), _field(inference_pb2.TemplateOptions, "tools")
        tool: Recipe = ["msg", _field(inference_pb2.Tool, "parameters"), ["cat", "[", ["rep", 60_000, "0,"], "0]"]]
        made: dict[str, Recipe] = {
            "whole turns": ["rep", MAX_MESSAGES, turn(["rep", 1000, "a"])],
            "whole text": turn(text),
            "whole kwargs": [
                "cat",
                turn("a"),
                [
                    "msg",
                    template,
                    [
                        "msg",
                        _field(inference_pb2.TemplateOptions, "chat_template_kwargs"),
                        ["cat", "{", ["each", 7000, '"', '":0,'], '"z":0}'],
                    ],
                ],
            ],
            "whole tools": [
                "cat",
                turn("a"),
                ["msg", template, ["rep", 100, ["msg", tools, ["cat", ["msg", 1, "f"], tool]]]],
            ],
        }
        if method == "Tokenize":
            made["whole words"] = ["msg", _field(kind, "text"), ["rep", 800_000, "ab c "]]
            made["whole told"] = ["msg", _field(kind, "text"), ["rep", 262_000, "\u00e9"]]
            made["whole prompt"] = ["msg", _field(kind, "text"), text]
        return made
    if method in ("LoadModel", "Plan"):
        kind = cluster_pb2.LoadModelRequest if method == "LoadModel" else cluster_pb2.PlanRequest
        model: Recipe = ["msg", _field(kind, "model"), "faq"]
        layers = _field(kind, "layers")
        return {
            "whole layers": ["cat", model, ["msg", layers, ["rep", 4_000_000, "0,"]]],
            "whole digits": ["cat", model, ["msg", layers, ["rep", 15 * MIB, "9"]]],
        }
    if method == "Describe":
        return {
            "whole serials": ["rep", 4096, ["msg", _field(worker_pb2.DescribeRequest, "revoked"), ["rep", 4000, "a"]]]
        }
    return {}


def _targets() -> Iterator[CostTarget]:
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield CostTarget(
                    f"grpc-{method.name}",
                    "a message of 16 MiB",
                    MAX_CONTROL_BYTES,
                    AT_ONCE,
                    lambda s=service, m=method.name: _entry(s, m),  # type: ignore[misc]
                    lambda m=method: {**seeds_of(m.input_type), **_more(m.name)},  # type: ignore[misc]
                    ATOMS,
                    job_limit,
                )


TARGETS = (
    *_targets(),
    CostTarget(
        "answer-Describe",
        "a worker's answer of 256 KiB",
        MAX_ANSWER_BYTES,
        AT_ONCE,
        _facts_entry,
        lambda: seeds_of(worker_pb2.DescribeResponse.DESCRIPTOR, MAX_ANSWER_BYTES),
        ATOMS,
    ),
)
