"""Errors of the shared checks name the field as the client's own form has it, over HTTP and gRPC alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import pytest

from cluster.api.grpc.inference_service import InferenceServicer
from cluster.api.grpc.proto_decoding import known_tokens
from cluster.api.http.body import Form, parse
from cluster.api.http.openapi import BODIES
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.api.requests import (
    TOOL_SCHEMA,
    ChatParams,
    GenerateParams,
    SamplingOptions,
    grammar_names,
    rename_fields,
)
from cluster.core.errors import InvalidGrammar, InvalidRequest, MacpipeError
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import MAX_PROMPT_BYTES, MAX_SAMPLES
from cluster.core.request import ChatOptions, GrammarKind
from cluster.sandbox.sandboxed_tokenizer import Tokenized
from cluster.security.credentials import LocalTrust
from cluster.v1 import inference_pb2 as pb
from fuzz.targets.asked import SEEDS

pytestmark = pytest.mark.anyio

GRAMMARS = {kind.value for kind in GrammarKind}
PARAMETERS = {
    f.name for kind in (GenerateParams, ChatParams, SamplingOptions, ChatOptions) for f in dataclasses.fields(kind)
}
NAMED = [(path, form) for path, form, _ in BODIES if hasattr(form, "field_names")]


@pytest.mark.parametrize(("path", "form"), NAMED, ids=[path for path, _ in NAMED])
def test_forms_name_parameters_that_exist_by_fields_that_exist(path: str, form: type[Form]) -> None:
    parsed: Any = parse(json.dumps(SEEDS[path][0]).encode(), form)
    for parameter, field in parsed.field_names().items():
        if parameter == TOOL_SCHEMA:
            tool = parsed.tools[0].model_dump()
            for name in field.split(".")[1:]:
                assert name in tool
                tool = tool[name]
        else:
            assert parameter in PARAMETERS | GRAMMARS | {"messages"}
            assert field.split(".")[0] in form.model_fields


@pytest.mark.parametrize(
    ("raised", "named"),
    [("prompt", "input"), ("tools[3]", "tools[3].schema"), ("tools[3].name", "tools[3].name"), ("stop", "stop")],
)
def test_a_field_is_renamed_where_the_form_calls_it_otherwise(raised: str, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught, rename_fields({"prompt": "input", TOOL_SCHEMA: ".schema"}):
        raise InvalidRequest("no", field=raised)
    assert caught.value.field == named


def test_every_kind_of_grammar_has_the_forms_name() -> None:
    assert grammar_names("text.format") == dict.fromkeys(GRAMMARS, "text.format")


class Served:
    """A coordinator whose grammars are invalid, and a text service whose prompts have one token."""

    speculates = False
    text: Any = property(lambda self: self)
    tokenizer = None
    vocabulary = 10
    adapter = None
    shape = type("Shape", (), {"max_context": 100})

    def served_model(self, model: str, adapter: str = "") -> Any:
        return self

    async def accept(self, request: Any, model_info: Any) -> NoReturn:
        raise InvalidGrammar("the lark cannot be compiled", field="lark")

    async def converse(self, *given: Any, **more: Any) -> Tokenized:
        return Tokenized(ids=(1,), count=1)


class Refused(Exception):
    """Ends a call, as gRPC's own error does."""


class Call:
    """The context of a call."""

    async def abort(self, code: Any, details: str, metadata: Any) -> NoReturn:
        raise Refused

    def auth_context(self) -> dict[str, Any]:
        return {}

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"


TOOLS = pb.TemplateOptions(tools=[pb.Tool(name="f")])
HI = pb.ChatMessage(role="user", content="hi")


@pytest.mark.parametrize(
    ("request_sent", "field"),
    [
        (pb.ChatRequest(messages=[HI], template=TOOLS), "tools"),
        (pb.ChatRequest(messages=[HI], template=TOOLS, grammar=pb.Grammar(lark="start: X")), "lark"),
        (pb.GenerateRequest(text="x" * (MAX_PROMPT_BYTES + 1)), "prompt"),
        (pb.TokenizeRequest(text="x" * (MAX_PROMPT_BYTES + 1)), "text"),
        (pb.TokenizeRequest(text="x", messages=[HI]), "messages"),
    ],
    ids=["tools", "grammar", "prompt", "text", "both"],
)
async def test_grpc_names_its_own_fields(request_sent: Any, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[MacpipeError] = []

    async def tell(context: Any, error: MacpipeError) -> NoReturn:
        told.append(error)
        raise Refused

    monkeypatch.setattr("cluster.api.grpc.inference_service.abort", tell)
    service: Any = InferenceServicer(RequestService(Served(), Metrics()), LocalTrust())  # type: ignore[arg-type]
    answer = getattr(service, type(request_sent).__name__.removesuffix("Request"))(request_sent, Call())
    with pytest.raises(Refused):
        await (anext(answer) if isinstance(answer, AsyncIterator) else answer)
    assert [error.field for error in told] == [field]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"offsets": [0] * (MAX_SAMPLES + 1)}, "offsets"),
        ({"offset": 3, "digests": [b"short"]}, "digests"),
        ({"offsets": [1, 2], "digests": [bytes(32)]}, "digests"),
        ({"digests": [bytes(32), bytes(32)]}, "digests"),
    ],
)
async def test_tokens_that_a_client_has_are_one_digest_for_each_offset(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        known_tokens(pb.ResumeRequest(**wrong))
    assert refused.value.field == field


async def test_tokens_that_a_client_has_may_come_without_digests() -> None:
    assert known_tokens(pb.ResumeRequest(offset=3)) == (KnownTokens(3),)
    both = pb.ResumeRequest(offsets=[1, 0], digests=[bytes(32), b""])
    assert known_tokens(both) == (KnownTokens(1, bytes(32)), KnownTokens(0))
