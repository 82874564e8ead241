"""Cost targets of HTTP: each form's body through middleware, routes, parsing and grammar check; request heads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from cluster.api.http.app import application
from cluster.api.http.connection import Connection
from cluster.api.http.connection_limit import ConnectionLimit
from cluster.api.http.openapi import BODIES
from cluster.core.limits import KIB, MAX_BODY_BYTES, MAX_CONNECTIONS, MAX_MESSAGES, MAX_SCHEMA_BYTES, MIB
from fuzz.cost.recipe import Recipe, filled
from fuzz.cost.stand_in import PASSED, request_service
from fuzz.cost.target import SANDBOX_CLOSED, TAKEN, CostTarget, Entry, job_limit

PIECE = 256 * KIB
"""What asyncio reads from a connection at once, at most."""
AT_ONCE = 16
MAX_HEAD = 256 * KIB
"""Sent as a head: h11 refuses it before that."""
HARMLESS: tuple[Recipe, ...] = ("{}", "[]", "0", '""', "null", '"a"')
ATOMS: tuple[Recipe, ...] = (
    *HARMLESS,
    *(
        ",",
        "{},",
        "[],",
        "0,",
        '"",',
        "-1,",
        "1e999,",
        "1.5e-300,",
        '"a":0,',
        '"\\u0041"',
        '"\\ud83d\\ude00"',
        " ",
        "\\u00e9",
        "\u00e9",
    ),
    ["rep", 1000, "9"],
    ["rep", 1000, "a"],
    ["rep", 1000, "\\n"],
    ["nest", 100, "[", "", "]"],
    ["nest", 100, '{"a":', "0", "}"],
    ["each", 1000, '"', '":0,'],
)
NAMED: dict[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count",
    "/tokenize": "tokenize",
    "/v1/embeddings": "embeddings",
    "/api/embed": "ollama-embed",
    "/api/embeddings": "ollama-embeddings",
    "/api/chat": "ollama-chat",
    "/api/generate": "ollama-generate",
    "/api/show": "ollama-show",
}
TURN = '{"role":"user","content":"hello"}'


def _entry(path: str) -> Entry:
    app = application(request_service())

    async def take(body: bytes) -> str:
        told: list[dict[str, Any]] = []
        sent = (body[at : at + PIECE] for at in range(0, max(1, len(body)), PIECE))  # each is cut when it is read
        left = max(1, -(-len(body) // PIECE))

        async def receive() -> dict[str, Any]:
            nonlocal left
            await asyncio.sleep(0)
            if not left:
                return {"type": "http.disconnect"}
            left -= 1
            return {"type": "http.request", "body": next(sent), "more_body": left > 0}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)

        await app(scope_of(path, len(body)), receive, send)
        return _outcome(told)

    return Entry(take)


def scope_of(path: str, length: int) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "server": ("127.0.0.1", 8080),
        "client": ("127.0.0.1", 5), "scheme": "http", "method": "POST", "root_path": "", "path": path,
        "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost:8080"), (b"content-length", str(length).encode())],
    }  # fmt: skip


def _outcome(told: list[dict[str, Any]]) -> str:
    status = next((one["status"] for one in told if one["type"] == "http.response.start"), 0)
    body = b"".join(one.get("body", b"") for one in told)
    if SANDBOX_CLOSED.encode() in body:
        return SANDBOX_CLOSED
    if status == 200 or PASSED.encode() in body:
        return TAKEN
    return f"!! HTTP {status}" if status in (0, 500) else f"HTTP {status}"


def _seeds(path: str, form: Any) -> Mapping[str, Recipe]:
    """What no schema says: bodies that are JSON and no form, and conversations as long as they may be; then, for each
    place of the form that holds a list, an object or a text, as much there as there may be.
    """
    made: dict[str, Recipe] = {
        "unknown keys": ["cat", "{", ["each", 1000, '"', '":0,'], '"z":0}'],
        "one key again": ["cat", "{", ["rep", 1000, '"model":"a",'], '"z":0}'],
        "nested lists": ["cat", '{"metadata":', ["nest", 1000, "[", "", "]"], "}"],
        "nested objects": ["cat", '{"metadata":', ["nest", 1000, '{"a":', "0", "}"], "}"],
        "ignored list": ["cat", '{"metadata":[', ["rep", 1000, "{},"], "0]}"],
        "ignored numbers": ["cat", '{"metadata":[', ["rep", 1000, "1.7976931348623157e308,"], "0]}"],
        "digits": ["cat", '{"seed":', ["rep", 1000, "9"], "}"],
        "blanks": ["rep", 1000, " "],
        "escapes": ["cat", '{"model":"', ["rep", 1000, "\\u00e9"], '"}'],
        "pairs": ["cat", '{"model":"', ["rep", 1000, "\\ud83d\\ude00"], '"}'],
        "no JSON": ["rep", 1000, "["],
    }
    made |= {f"{place} {what}": recipe for place, what, recipe in _places(form.model_json_schema(by_alias=True))}
    made |= _whole(path)
    return {
        what: recipe if what.startswith("whole") else filled(recipe, MAX_BODY_BYTES) for what, recipe in made.items()
    }


def _places(schema: dict[str, Any]) -> Iterator[tuple[str, str, Recipe]]:
    """A recipe for each list, object and text of a form, with what has to be around it."""
    known = schema.get("$defs", {})
    waiting: list[tuple[dict[str, Any], str, str, str, int]] = [(schema, "", "", "", 0)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        node, place, before, after, depth = waiting.pop()
        if "$ref" in node:
            node = known[node["$ref"].rpartition("/")[2]]
        for branch in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
            waiting.append((branch, place, before, after, depth))
        if depth > 8 or (place, str(node.get("type"))) in seen:
            continue
        seen.add((place, str(node.get("type"))))
        if node.get("type") == "array":
            for item in (*HARMLESS, "{},{}", "-1"):
                yield place, f"list of {item}", ["cat", f"{before}[", ["rep", 1000, f"{item},"], f"{item}]{after}"]
            waiting.append((node.get("items", {}), f"{place}[]", f"{before}[", f"]{after}", depth + 1))
        if node.get("type") == "string" and place:
            yield place, "text", ["cat", f'{before}"', ["rep", 1000, "a"], f'"{after}']
        if node.get("type") == "object" and "properties" not in node:
            yield place, "keys", ["cat", f"{before}{{", ["each", 1000, '"', '":0,'], f'"z":0}}{after}']
        for name, inner in node.get("properties", {}).items():
            waiting.append((inner, f"{place}.{name}", f'{before}{{"{name}":', f"}}{after}", depth + 1))


def _whole(path: str) -> dict[str, Recipe]:
    """Return acceptable requests, with as much of everything as is allowed."""
    turns = ["rep", MAX_MESSAGES - 1, '{"role":"user","content":"hello there"},']
    calls = '{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}}'
    tool = '","parameters":{"type":"object","properties":{"a":{"type":"string"}}}}},'
    required = '],"tool_choice":"required","tools":['
    named, last = '{"type":"function","function":{"name":"f', '{"type":"function","function":{"name":"g"}}]}'
    multiple = '","parameters":{"properties":{"a":{"type":"integer","multipleOf":99991}}}}},'
    patterns = '","parameters":{"properties":{"a":{"allOf":[{"pattern":"(.*a.{9})+"},{"pattern":"(.*b.{9})+"}]}}}}},'
    faulty = '{"type":"function","function":{"name":"g","parameters":{"pattern":"["}}}]}'
    if path == "/v1/chat/completions":
        chat = ["cat", '{"messages":[']
        return {
            "whole turns": [*chat, turns, TURN, "]}"],
            "whole text": [*chat, '{"role":"user","content":"', ["rep", 4 * MIB - 64, "a"], '"}]}'],
            "whole words": [*chat, '{"role":"user","content":"', ["rep", 800_000, "ab c "], '"}]}'],
            "whole parts": [
                *chat,
                '{"role":"user","content":[',
                ["rep", 400_000, '{"type":"text","text":"a"},'],
                '{"type":"text","text":"b"}]}]}',
            ],
            "whole calls": [
                *chat,
                TURN,
                ',{"role":"assistant","tool_calls":[',
                ["rep", 100_000, f"{calls},"],
                calls,
                "]},",
                TURN,
                "]}",
            ],
            "whole answers": [
                *chat,
                TURN,
                ',{"role":"assistant","tool_calls":[',
                ["rep", 4000, f"{calls},"],
                calls,
                "]},",
                ["rep", 4000, '{"role":"tool","content":"x","tool_call_id":"a"},'],
                TURN,
                "]}",
            ],
            "whole late answers": [
                *chat,
                ["rep", 2000, '{"role":"assistant","tool_calls":[' + calls.replace('"a"', '"b"', 1) + "]},"],
                '{"role":"assistant","tool_calls":[',
                calls,
                "]},",
                ["rep", 2000, '{"role":"tool","content":"x","tool_call_id":"a"},'],
                TURN,
                "]}",
            ],
            "whole tools": [
                *chat,
                TURN,
                '],"tools":[',
                ["each", 255, '{"type":"function","function":{"name":"f', tool],
                '{"type":"function","function":{"name":"g"}}]}',
            ],
            "whole required tools": [
                *chat,
                TURN,
                '],"tool_choice":"required","tools":[',
                ["each", 255, '{"type":"function","function":{"name":"f', tool],
                '{"type":"function","function":{"name":"g"}}]}',
            ],
            "whole required multiples": [*chat, TURN, required, ["each", 60, named, multiple], last],
            "whole required patterns": [*chat, TURN, required, ["each", 60, named, patterns], last],
            "whole tools at fault": [*chat, TURN, required, ["each", 250, named, patterns], faulty],
            "whole arguments": [
                *chat,
                TURN,
                ',{"role":"assistant","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{\\"a\\":[',
                ["rep", 1_900_000, "0,"],
                '0]}"}}]},',
                TURN,
                "]}",
            ],
            "whole kwargs": [*chat, TURN, '],"chat_template_kwargs":{', ["each", 5000, '"', '":0,'], '"z":0}}'],
            "whole schema": [
                *chat,
                TURN,
                '],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"object","properties":{',
                ["each", 2400, '"p', '":{"type":"string"},'],
                '"z":{}}}}}}',
            ],
            "whole deep schema": [
                *chat,
                TURN,
                '],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":',
                ["nest", 100, '{"type":"array","items":', "{}", "}"],
                "}}}",
            ],
            "whole bias": [*chat, TURN, '],"logit_bias":{', ["each", 1000, '"1', '":1,'], '"0":1}}'],
            "whole multiple": [
                *chat,
                TURN,
                '],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"integer","multipleOf":999983}}}}',
            ],
        }
    if path == "/v1/completions":
        return {
            "whole text": ["cat", '{"prompt":"', ["rep", 4 * MIB - 64, "a"], '"}'],
            "whole ids": ["cat", '{"prompt":[', ["rep", 4_000_000, "1,"], "1]}"],
            "whole prompts": ["cat", '{"prompt":[', ["rep", 63, ["cat", '"', ["rep", 250_000, "a"], '",']], '"a"]}'],
            "whole lists of ids": [
                "cat",
                '{"prompt":[',
                ["rep", 63, ["cat", "[", ["rep", 100_000, "1,"], "1],"]],
                "[1]]}",
            ],
            "whole regex": [
                "cat",
                '{"prompt":"a","response_format":{"type":"regex","regex":"',
                ["rep", MAX_SCHEMA_BYTES - 200, "a"],
                '"}}',
            ],
        }
    if path == "/v1/responses":
        said = '{"role":"assistant","content":"hello"},'
        call = '{"type":"function_call","call_id":"a","name":"f","arguments":"{}"},'
        return {
            "whole items": [
                "cat",
                '{"input":[',
                ["rep", MAX_MESSAGES - 1, '{"role":"user","content":"hello"},'],
                TURN,
                "]}",
            ],
            "whole one turn": ["cat", '{"input":[', ["rep", 400_000, said], TURN, "]}"],
            "whole reasoning": [
                "cat",
                '{"input":[',
                ["rep", 200_000, '{"type":"reasoning","summary":[{"type":"summary_text","text":"so"}]},'],
                TURN,
                "]}",
            ],
            "whole calls": ["cat", '{"input":[', ["rep", 200_000, call], TURN, "]}"],
            "whole text": ["cat", '{"input":"', ["rep", 4 * MIB - 64, "a"], '"}'],
        }
    if path == "/tokenize":
        return {
            "whole text": ["cat", '{"prompt":"', ["rep", 4 * MIB - 64, "a"], '"}'],
            "whole told": ["cat", '{"prompt":"', ["rep", 60_000, "hello "], '"}'],
            "whole tokens": ["cat", '{"prompt":"', ["rep", 262_000, "\u00e9"], '"}'],
            "whole turns": ["cat", '{"messages":[', turns, TURN, "]}"],
        }
    if path == "/api/chat":
        return _whole_ollama(turns)
    if path == "/api/generate":
        return {
            "whole text": ["cat", '{"model":"default","prompt":"', ["rep", 4 * MIB - 64, "a"], '"}'],
            "whole raw": ["cat", '{"model":"default","raw":true,"prompt":"', ["rep", 60_000, "hello "], '"}'],
        }
    if path == "/api/show":
        return {}
    if path in ("/v1/embeddings", "/api/embed"):
        return {
            "whole text": ["cat", '{"model":"default","input":"', ["rep", 4 * MIB - 64, "a"], '"}'],
            "whole texts": ["cat", '{"model":"default","input":[', ["rep", 2047, '"hello there",'], '"hello"]}'],
        }
    if path == "/api/embeddings":
        return {"whole text": ["cat", '{"model":"default","prompt":"', ["rep", 4 * MIB - 64, "a"], '"}']}
    model = (
        '{"model":"default","max_tokens":1,"messages":['
        if path == "/v1/messages"
        else '{"model":"default","messages":['
    )
    use = '{"type":"tool_use","id":"a","name":"f","input":{}},'
    result = '{"type":"tool_result","tool_use_id":"a","content":"x"},'
    return {
        "whole turns": ["cat", model, turns, TURN, "]}"],
        "whole text": ["cat", model, '{"role":"user","content":"', ["rep", 4 * MIB - 64, "a"], '"}]}'],
        "whole blocks": [
            "cat",
            model,
            '{"role":"user","content":[',
            ["rep", 400_000, '{"type":"text","text":"a"},'],
            '{"type":"text","text":"b"}]}]}',
        ],
        "whole results": [
            "cat",
            model,
            '{"role":"assistant","content":[',
            ["rep", 2000, use],
            '{"type":"text","text":"b"}]},{"role":"user","content":[',
            ["rep", 2000, result],
            '{"type":"text","text":"b"}]}]}',
        ],
    }


def _whole_ollama(turns: Recipe) -> dict[str, Recipe]:
    """Return acceptable conversations in Ollama's form. A result is matched with an earlier call by its tool's name."""
    chat = ["cat", '{"model":"default","messages":[']
    call = '{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{}}}]},'
    return {
        "whole turns": [*chat, turns, TURN, "]}"],
        "whole text": [*chat, '{"role":"user","content":"', ["rep", 4 * MIB - 64, "a"], '"}]}'],
        "whole results": [
            *chat,
            ["rep", 2000, call],
            ["rep", 2000, '{"role":"tool","content":"x","tool_name":"f"},'],
            TURN,
            "]}",
        ],
        "whole results of other tools": [
            *chat,
            ["rep", 2000, call],
            ["rep", 2000, '{"role":"tool","content":"x","tool_name":"g"},'],
            TURN,
            "]}",
        ],
        "whole properties": [
            *chat,
            TURN,
            '],"tools":[{"type":"function","function":{"name":"f","parameters":{"properties":{',
            ["each", 5000, '"', '":{"type":"null, string"},'],
            '"z":{}}}}}]}',
        ],
    }


def _heads() -> Entry:
    """Parse a request's head with the server's connection, up to the look-up of its route."""
    reached = application(request_service())
    config = Config(reached, http="h11", loop="none", ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()

    async def take(head: bytes) -> str:
        told: list[bytes] = []
        seats = ConnectionLimit(MAX_CONNECTIONS)
        seat = seats.take("127.0.0.1")
        assert seat
        connection = Connection(seats, seat, config=config, server_state=ServerState(), app_state={})
        connection.connection_made(_Transport(told))  # type: ignore[arg-type]
        for at in range(0, len(head), PIECE):
            connection.data_received(head[at : at + PIECE])
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        first = b"".join(told).partition(b"\r\n")[0].decode("latin-1").split(" ")
        return TAKEN if len(first) < 2 or first[1] == "200" else f"HTTP {first[1]}"

    assert issubclass(Connection, H11Protocol)
    assert h11
    return Entry(take)


class _Transport(asyncio.Transport):
    """A connection's other end that takes whatever is said."""

    def __init__(self, told: list[bytes]) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 8080)})
        self._told = told

    def write(self, data: Any) -> None:
        self._told.append(bytes(data))

    def close(self) -> None: ...

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def _head_seeds() -> Mapping[str, Recipe]:
    get, host = "GET /live HTTP/1.1\r\n", "host: localhost:8080\r\n"
    made: dict[str, Recipe] = {
        "headers": ["cat", get, host, ["rep", 1000, "a:b\r\n"], "\r\n"],
        "names": ["cat", get, host, ["each", 1000, "x", ":b\r\n"], "\r\n"],
        "one header": ["cat", get, host, "x: ", ["rep", 1000, "a"], "\r\n\r\n"],
        "folded": ["cat", get, host, "x: a\r\n", ["rep", 1000, " b\r\n"], "\r\n"],
        "path": ["cat", "GET /", ["rep", 1000, "a/"], " HTTP/1.1\r\n", host, "\r\n"],
        "model": ["cat", "GET /v1/models/", ["rep", 1000, "%2e"], " HTTP/1.1\r\n", host, "\r\n"],
        "query": ["cat", "GET /live?", ["rep", 1000, "a&"], " HTTP/1.1\r\n", host, "\r\n"],
        "key": ["cat", get, host, "authorization: Bearer mpk_", ["rep", 1000, "a"], "\r\n\r\n"],
        "origin": ["cat", get, host, "origin: http://", ["rep", 1000, "["], "\r\n\r\n"],
        "host": ["cat", get, "host: ", ["rep", 1000, "a."], "\r\n\r\n"],
        "cors": [
            "cat",
            "OPTIONS /live HTTP/1.1\r\n",
            host,
            "origin: http://localhost:8080\r\naccess-control-request-headers: ",
            ["rep", 1000, "a,"],
            "\r\n\r\n",
        ],
        "timeout": ["cat", get, host, "x-request-timeout: ", ["rep", 1000, "9"], "\r\n\r\n"],
        "blanks": ["rep", 1000, "\r\n"],
        "no end": ["rep", 1000, "a"],
        "pipelined": ["rep", 1000, f"{get}{host}\r\n"],
        "chunks": [
            "cat",
            "POST /v1/completions HTTP/1.1\r\n",
            host,
            "transfer-encoding: chunked\r\n\r\n",
            ["rep", 1000, "1\r\na\r\n"],
            "0\r\n\r\n",
        ],
        "chunk extension": [
            "cat",
            "POST /v1/completions HTTP/1.1\r\n",
            host,
            "transfer-encoding: chunked\r\n\r\n1;",
            ["rep", 1000, "a"],
            "\r\na\r\n0\r\n\r\n",
        ],
        "trailers": [
            "cat",
            "POST /v1/completions HTTP/1.1\r\n",
            host,
            "transfer-encoding: chunked\r\n\r\n0\r\n",
            ["rep", 1000, "a:b\r\n"],
            "\r\n",
        ],
    }
    return {name: filled(recipe, MAX_HEAD) for name, recipe in made.items()}


TARGETS = (
    *(
        CostTarget(
            f"http-{NAMED[path]}",
            "a body of 16 MiB",
            MAX_BODY_BYTES,
            AT_ONCE,
            lambda path=path: _entry(path),  # type: ignore[misc]
            lambda path=path, form=form: _seeds(path, form),  # type: ignore[misc]
            ATOMS,
            job_limit,
        )
        for path, form, _ in BODIES
    ),
    CostTarget(
        "http-head",
        "256 KiB of heads",
        MAX_HEAD,
        AT_ONCE,
        _heads,
        _head_seeds,
        ("a", "\r\n", "a:b\r\n", "%2e", " ", ";", ","),
    ),
)
