# ruff: noqa: UP031  # JSON is full of braces
"""Measures the cost of the worst HTTP bodies and gRPC messages within the bounds, until accepted or refused.

Each runs in a separate process, through the code that serves it. It may block the event loop for at most 50 ms at a
time, and take 0.5 s of CPU and 256 MiB. Stalls are measured in CPU time of all threads of the process, so that other
programs on a busy machine do not count.

    python ops/bench/request_cost.py [--only WORD] [--json]
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from figures import Figure, options, print_figures
from starlette.requests import Request

from cluster.api.conversation_validation import check_messages, check_options
from cluster.api.grpc.proto_decoding import chat_params
from cluster.api.http.body import CHARGE, build, read
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.completions_form import CompletionsForm
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.limits import MAX_ITEMS, MAX_JSON_VALUES
from cluster.api.requests import Conversation
from cluster.core.errors import MacpipeError
from cluster.core.limits import (
    MAX_BODY_BYTES,
    MAX_FIELDS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_PROMPT_BYTES,
    MAX_PROMPT_IDS,
)
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.message_bounds import count_fields
from cluster.v1 import inference_pb2 as pb

STALL_MS, CPU_MS, MEMORY_MIB = 50.0, 500.0, 256.0
PART = 64 * 1024
WARM = b'{"messages":[{}]' + b" " * 2 * PART + b"}"


@dataclass(frozen=True)
class Cost:
    """The cost of one request: the longest stall of the event loop, CPU time, and memory."""

    stall_ms: float
    cpu_ms: float
    memory_mib: float
    outcome: str


def listed(item: str, count: int) -> str:
    return ",".join([item] * count)


def http_bodies() -> Iterator[tuple[str, type, bytes]]:
    turn, long = '{"role":"user","content":"a"}', MAX_BODY_BYTES - 100
    chat = '{"messages":[%s]}'
    keys = ",".join(f'"{i:x}":9e9' for i in range(60_000))
    text = '{"messages":[{"role":"user","content":"%s"}]}'
    schema = '{"items":' * 150 + '{"anyOf":[%s]}' % listed('{"not":{}}', MAX_JSON_VALUES // 3) + "}" * 150
    tool = '{"type":"function","function":{"name":"f%d","parameters":%s}}'
    called = '{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"f","arguments":"%s"}}]}'
    cases: dict[str, tuple[type, str]] = {
        "five million empty messages": (ChatForm, chat % listed("{}", long // 3)),
        "65,000 numbers for messages": (ChatForm, chat % listed("0", 65_000)),
        "the most messages": (ChatForm, chat % listed(turn, MAX_MESSAGES)),
        "60,000 unknown fields": (ChatForm, "{%s}" % keys),
        "60,000 biases": (ChatForm, f'{{"messages":[{turn}],"logit_bias":{{{keys}}}}}'),
        "the most biases": (
            ChatForm, f'{{"messages":[{turn}],"logit_bias":{{{",".join(keys.split(",")[:MAX_LOGIT_BIAS])}}}}}',
        ),
        "deep and wide schemas": (
            ChatForm, f'{{"messages":[{turn}],"tools":[{",".join(tool % (i, schema) for i in range(3))}]}}',
        ),
        "arguments of five million lists": (ChatForm, chat % (called % ('{\\"a\\":[' + "[]," * (long // 3) + "0]}"))),
        "letters": (ChatForm, text % ("x" * long)),
        "letters and one emoji": (ChatForm, text % ("\U0001f600" + "x" * long)),
        "escaped line ends": (ChatForm, text % ("\\n" * (long // 2))),
        "escaped quotes": (ChatForm, text % ('\\"' * (long // 2))),
        "escaped emoji": (ChatForm, text % ("\\ud83d\\ude00" * (long // 12))),
        "long integers": (ChatForm, f'{{"messages":[{turn}],"user":[{listed("9" * 4200, 1990)}]}}'),
        "the most token ids": (CompletionsForm, '{"prompt":[%s]}' % listed("99999", MAX_PROMPT_IDS)),
        "the last token id is wrong": (CompletionsForm, '{"prompt":[%s,-1]}' % listed("99999", MAX_PROMPT_IDS - 1)),
        "a million strings for prompts": (CompletionsForm, '{"prompt":[%s]}' % listed('"a"', 1_000_000)),
        "the most items": (ResponsesForm, '{"input":[%s]}' % listed(turn, MAX_ITEMS)),
        "items that lengthen a long text": (
            ResponsesForm,
            '{"input":[{"role":"assistant","content":"%s"},%s]}'
            % ("x" * 4_000_000, listed('{"role":"assistant","content":"a"}', 12_000)),
        ),
        "blocks in blocks": (
            MessagesForm,
            '{"model":"a","max_tokens":1,"messages":[{"role":"user","content":%s%s%s}]}'
            % ('[{"type":"tool_result","content":' * 90, f"[{listed('{}', 4096)}]", "}]" * 90),
        ),
    }  # fmt: skip
    for name, (form, body) in cases.items():
        yield name, form, body.encode()[:MAX_BODY_BYTES]


def grpc_messages() -> Iterator[tuple[str, type, bytes]]:
    call = pb.ToolCall(id="c", name="f", arguments="{}")
    turn = pb.ChatMessage(role="assistant", content="a" * 900, tool_calls=[call])
    yield "gRPC: eight million empty messages", pb.ChatRequest, b"\x1a\x00" * (MAX_BODY_BYTES // 2)
    yield "gRPC: just as many fields as may be", pb.ChatRequest, b"\x1a\x00" * MAX_FIELDS
    yield (
        "gRPC: four thousand messages with calls",
        pb.ChatRequest,
        pb.ChatRequest(messages=[turn] * 4000).SerializeToString(),
    )


async def serve_body(form: Any, body: bytes) -> None:
    parts = iter([body[start : start + PART] for start in range(0, len(body), PART)])

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        part = next(parts, b"")
        return {"type": "http.request", "body": part, "more_body": bool(part)}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], CHARGE: ByteBudget().open("")}
    request = Request(scope, receive)
    parsed = await read(request, form)
    params = await build(request, lambda: parsed.params("id"))
    if form is not CompletionsForm:
        take_in(params.conversation)


async def serve_message(kind: Any, data: bytes) -> None:
    count_fields(data, kind.DESCRIPTOR)
    take_in(chat_params(kind.FromString(data)).conversation)


def take_in(conversation: Conversation) -> None:
    """Process a parsed request as the event loop does."""
    check_messages(conversation.messages, MAX_PROMPT_BYTES)
    check_options(conversation.options)


def measure(serve: Callable[[Any, bytes], Awaitable[None]], kind: Any, data: bytes, told: Any) -> None:
    stall, outcome = 0.0, "accepted"

    async def tick() -> None:
        nonlocal stall
        while True:
            last = process_time()
            await asyncio.sleep(0.001)
            stall = max(stall, process_time() - last)

    async def run() -> None:
        nonlocal outcome
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        try:
            await serve(kind, data)
        except MacpipeError as e:
            outcome = e.sentence[:48]
        await asyncio.sleep(0.003)
        ticking.cancel()

    with contextlib.suppress(MacpipeError):  # what is made once, by the first request
        asyncio.run(serve(kind, WARM if serve is serve_body else b""))
    gc.collect()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, process_time()
    asyncio.run(run())
    cpu, grown = process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1024 if sys.platform == "linux" else 1024**2
    told.send(Cost(1e3 * stall, 1e3 * cpu, grown / unit, outcome))


def cost_of(serve: Callable[[Any, bytes], Awaitable[None]], kind: Any, data: bytes) -> Cost:
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=measure, args=(serve, kind, data, there))
    child.start()
    there.close()
    cost: Cost = here.recv()
    child.join()
    return cost


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cases: list[tuple[str, Any, bytes, Any]] = [(*case, serve_body) for case in http_bodies()]
    cases += [(*case, serve_message) for case in grpc_messages()]
    figures, over = [], 0
    for name, kind, data, serve in cases:
        if asked.only not in name:
            continue
        costs = [cost_of(serve, kind, data) for _ in range(asked.rounds)]
        best = min(costs, key=lambda cost: cost.stall_ms)
        over += best.stall_ms > STALL_MS or best.cpu_ms > CPU_MS or best.memory_mib > MEMORY_MIB
        print(f"{name} ({len(data) / 2**20:.1f} MiB): {best.outcome}", file=sys.stderr)
        for what, unit, of in (("stall", "ms", "stall_ms"), ("CPU", "ms", "cpu_ms"), ("memory", "MiB", "memory_mib")):
            figures.append(Figure(f"{name}, {what}", unit, [getattr(cost, of) for cost in costs]))
    print_figures("requests", figures, {}, asked.json, {"over the bounds": over})
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
