"""The OpenAPI document, generated from the forms that validate requests so that the two cannot differ."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from cluster import __version__
from cluster.api.http.body import Form
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.completions_form import CompletionsForm
from cluster.api.http.embeddings_form import EmbeddingsForm, OllamaEmbeddingsForm, OllamaEmbedForm
from cluster.api.http.errors import OLLAMA_ROUTES
from cluster.api.http.messages_form import CountForm, MessagesForm
from cluster.api.http.ollama_form import OllamaChatForm, OllamaGenerateForm
from cluster.api.http.ollama_models import ShowForm
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.http.tokenize import TokenizeForm

BODIES: Final[tuple[tuple[str, type[Form], str], ...]] = (
    ("/v1/chat/completions", ChatForm, "Answers a conversation, in OpenAI's format."),
    ("/v1/completions", CompletionsForm, "Continues a prompt."),
    ("/v1/responses", ResponsesForm, "Answers a conversation, in OpenAI's newer format; nothing is stored."),
    ("/v1/messages", MessagesForm, "Answers a conversation, in Anthropic's format."),
    ("/v1/messages/count_tokens", CountForm, "Counts the prompt tokens of a conversation."),
    ("/v1/embeddings", EmbeddingsForm, "Returns an embedding for each text."),
    ("/tokenize", TokenizeForm, "Returns the tokens of a text or a conversation."),
    ("/api/chat", OllamaChatForm, "Answers a conversation, in Ollama's format."),
    ("/api/generate", OllamaGenerateForm, "Answers or continues a prompt, in Ollama's format."),
    ("/api/embed", OllamaEmbedForm, "Returns an embedding for each text, in Ollama's format."),
    ("/api/embeddings", OllamaEmbeddingsForm, "Returns the embedding of a text, in Ollama's older format."),
    ("/api/show", ShowForm, "Returns the details of a model, in Ollama's format."),
)
READINGS: Final[tuple[tuple[str, str], ...]] = (
    ("/v1/models", "Lists the served model under each of its names."),
    ("/v1/models/{model}", "Returns one model."),
    (
        "/health",
        "200 while a token can pass through every stage, or a request would load the model; else 503 and the reason.",
    ),
    ("/ready", "The same as /health."),
    ("/live", "200 as long as the coordinator's process answers, also that of a standby."),
    ("/api/hello", "200 without content as long as the coordinator's process answers."),
    ("/api/tags", "Lists the models, in Ollama's format."),
    ("/api/ps", "Lists the models in memory, in Ollama's format."),
    ("/api/version", "The version of Ollama whose API this is."),
    ("/metrics", "Metrics in Prometheus' text format."),
)
_TEMPLATE: Final = "#/components/schemas/{model}"


@cache
def description() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document. The first call takes 60 ms of CPU."""
    references, schemas = models_json_schema([(form, "validation") for _, form, _ in BODIES], ref_template=_TEMPLATE)
    paths = {path: {"post": _post(path, text, references[form, "validation"])} for path, form, text in BODIES}
    paths |= {path: {"get": _get(path, text)} for path, text in READINGS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "macpipe", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR, "OllamaError": _OLLAMA_ERROR}},
    }


def _post(path: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": text, "requestBody": body, "responses": _responses(path)}


def _get(path: str, text: str) -> dict[str, Any]:
    reading: dict[str, Any] = {"summary": text, "responses": _responses(path)}
    if "{model}" in path:
        reading["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return reading


def _responses(path: str) -> dict[str, Any]:
    kind = "OllamaError" if path in OLLAMA_ROUTES else "Error"
    error = {"application/json": {"schema": {"$ref": _TEMPLATE.format(model=kind)}}}
    return {
        "200": {"description": "Success.", "content": {"application/json": {}}},
        "default": {"description": "Rejected or failed.", "content": error},
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
_OLLAMA_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
