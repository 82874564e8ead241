"""The description of this API: made from the forms that check the requests, so that the two cannot differ."""

from __future__ import annotations

from typing import Any, Final

from pydantic.json_schema import models_json_schema

from cluster import __version__
from cluster.api.http.body import Form
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.completions_form import CompletionsForm
from cluster.api.http.messages_form import CountForm, MessagesForm
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.http.tokenize import TokenizeForm

BODIES: Final[tuple[tuple[str, type[Form], str], ...]] = (
    ("/v1/chat/completions", ChatForm, "An answer to a conversation, OpenAI's way."),
    ("/v1/completions", CompletionsForm, "Text that goes on where a prompt ends."),
    ("/v1/responses", ResponsesForm, "OpenAI's newer shape; nothing is stored."),
    ("/v1/messages", MessagesForm, "An answer to a conversation, Anthropic's way."),
    ("/v1/messages/count_tokens", CountForm, "How long that conversation's prompt is."),
    ("/tokenize", TokenizeForm, "What the model would read."),
)
READINGS: Final[tuple[tuple[str, str], ...]] = (
    ("/v1/models", "What is served, under each of its names."),
    ("/v1/models/{model}", "One of them."),
    ("/health", "200 while a token goes through every stage, else 503 and why."),
    ("/ready", "The same."),
    ("/live", "200 as long as the coordinator's process answers."),
    ("/metrics", "Prometheus' text."),
)
_TEMPLATE: Final = "#/components/schemas/{model}"


def description() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    references, schemas = models_json_schema([(form, "validation") for _, form, _ in BODIES], ref_template=_TEMPLATE)
    paths = {path: {"post": _post(text, references[form, "validation"])} for path, form, text in BODIES}
    paths |= {path: {"get": _get(path, text)} for path, text in READINGS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "macpipe", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR}},
    }


def _post(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": text, "requestBody": body, "responses": _responses("application/json")}


def _get(path: str, text: str) -> dict[str, Any]:
    reading: dict[str, Any] = {"summary": text, "responses": _responses("application/json")}
    if "{model}" in path:
        reading["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return reading


def _responses(kind: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _TEMPLATE.format(model="Error")}}}
    return {
        "200": {"description": "Done.", "content": {kind: {}}},
        "default": {"description": "Refused, or failed.", "content": error},
    }


_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
