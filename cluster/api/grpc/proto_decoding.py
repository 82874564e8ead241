"""Decodes public protobuf messages into the parameters of a request."""

from __future__ import annotations

from collections.abc import Sequence
from secrets import token_hex
from typing import Any, TypeAlias

from cluster.api.embeddings import embedding_params
from cluster.api.limits import MAX_EMBEDDED
from cluster.api.requests import ChatParams, Conversation, GenerateParams, SamplingOptions, grammar_names
from cluster.codec.conversation import decode_message, decode_tool_choice
from cluster.core.errors import InvalidRequest
from cluster.core.known_tokens import DIGEST_BYTES, KnownTokens
from cluster.core.limits import MAX_MESSAGES, MAX_SAMPLES, MAX_TOOLS
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Tool
from cluster.v1 import inference_pb2 as pb

Answerable: TypeAlias = pb.GenerateRequest | pb.ChatRequest


def generate_params(message: pb.GenerateRequest) -> GenerateParams:
    """Decode the request for a prompt."""
    prompt = message.tokens.ids if message.WhichOneof("prompt") == "tokens" else message.text
    logprobs = message.prompt_logprobs if message.HasField("prompt_logprobs") else None
    return GenerateParams(prompt=prompt, prompt_logprobs=logprobs, **_answer_params(message))


def chat_params(message: pb.ChatRequest) -> ChatParams:
    """Decode the request for a conversation. Raises ``InvalidRequest``."""
    conversation = Conversation(messages(message.messages), template_options(message.template))
    return ChatParams(conversation=conversation, **_answer_params(message))


def tokenize_prompt(message: pb.TokenizeRequest) -> str | Conversation:
    """Decode the text or the conversation to tokenize. Raises ``InvalidRequest``, also if there are both."""
    if message.messages and message.text:
        raise InvalidRequest("both text and messages were given; send one of them", field="messages")
    if message.messages:
        return Conversation(messages(message.messages), template_options(message.template))
    return message.text


def embed_params(message: pb.EmbedRequest) -> list[GenerateParams]:
    """Decode the requests for the embeddings, one for each input. Raises ``InvalidRequest``."""
    if not 1 <= len(message.inputs) <= MAX_EMBEDDED:
        raise InvalidRequest(f"{len(message.inputs)} inputs were given; send from 1 to {MAX_EMBEDDED}", field="inputs")
    inputs = [one.tokens.ids if one.WhichOneof("input") == "tokens" else one.text for one in message.inputs]
    return embedding_params(f"embd-{token_hex(12)}", inputs)


def known_tokens(message: pb.ResumeRequest) -> tuple[KnownTokens, ...]:
    """Decode the tokens that the client has, of each sample or of all. Raises ``InvalidRequest``."""
    offsets = tuple(message.offsets) or (message.offset,)
    if len(offsets) > MAX_SAMPLES:
        raise InvalidRequest(f"{len(offsets)} offsets were given; send at most {MAX_SAMPLES}", field="offsets")
    digests = tuple(message.digests) or (b"",) * len(offsets)
    if len(digests) != len(offsets):
        raise InvalidRequest(f"{len(digests)} digests for {len(offsets)} offsets; send one each", field="digests")
    if any(len(digest) not in (0, DIGEST_BYTES) for digest in digests):
        raise InvalidRequest(f"a digest is not {DIGEST_BYTES} bytes long; send a SHA-256", field="digests")
    return tuple(map(KnownTokens, offsets, digests))


def field_names(message: Answerable) -> dict[str, str]:
    """Return the names that a message has for parameters which are called otherwise there.

    Without a grammar of its own, a chat has one that is made from its tools.
    """
    return {} if message.HasField("grammar") else grammar_names("tools")


def _answer_params(message: Answerable) -> dict[str, Any]:
    return {
        "request_id": message.request_id,
        "sampling": _sampling(message.sampling),
        "max_tokens": message.stop.max_tokens if message.stop.HasField("max_tokens") else None,
        "stop": tuple(message.stop.stop),
        "ignore_eos": message.stop.ignore_eos,
        "priority": message.priority,
        "samples": message.samples,
        "grammar": _grammar(message.grammar),
        "stage_timings": message.stage_timings,
        "prediction": message.prediction,
        "speculate": message.speculate if message.HasField("speculate") else True,
        "resumable": message.resumable,
    }


def _sampling(given: pb.SamplingOptions) -> SamplingOptions:
    """Decode the sampling options; those that are unset keep their defaults."""
    fields = {field.name: value for field, value in given.ListFields()}
    return SamplingOptions(**fields)


def messages(given: Sequence[pb.ChatMessage]) -> tuple[ChatMessage, ...]:
    """Decode a conversation. Only the number of messages is checked. Raises ``InvalidRequest``."""
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(given)} messages were given; send at most {MAX_MESSAGES}", field="messages")
    return tuple(map(decode_message, given))


def template_options(given: pb.TemplateOptions) -> ChatOptions:
    """Decode the options of a chat template. Raises ``InvalidRequest`` for an unknown tool choice or too many tools."""
    if len(given.tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(given.tools)} tools were given; send at most {MAX_TOOLS}", field="tools")
    return ChatOptions(
        tools=tuple(Tool(t.name, t.description, t.parameters) for t in given.tools),
        tool_choice=decode_tool_choice(given.tool_choice),
        tool_name=given.tool_choice.name,
        parallel_tool_calls=given.parallel_tool_calls if given.HasField("parallel_tool_calls") else True,
        enable_thinking=given.enable_thinking if given.HasField("enable_thinking") else None,
        reasoning_effort=given.reasoning_effort,
        template=given.chat_template_kwargs,
    )


def _grammar(given: pb.Grammar) -> Grammar | None:
    """Decode the grammar of an answer; None if it is unconstrained."""
    match given.WhichOneof("kind"):
        case None:
            return None
        case "json_object":
            return Grammar(GrammarKind.JSON_OBJECT) if given.json_object else None
        case kind:
            return Grammar(GrammarKind(kind), str(getattr(given, kind)))
