"""Validates a client's message and builds a tokenized request that fits the context, or raises a clear error."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.api.chat_preparation import check_messages, check_options, check_size
from cluster.api.grpc.proto_decoding import grammar, messages, template_options
from cluster.api.sampling_validation import sampling_params, stop_strings
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest, PromptTooLong
from cluster.core.limits import (
    DEFAULT_MAX_TOKENS,
    MAX_PRIORITY,
    MAX_REQUEST_ID_CHARS,
    MAX_SAMPLES,
    MAX_TOLD_TOKENS,
)
from cluster.core.request import ChatMessage, ChatOptions, Grammar, Parsing, Request, utf8_size
from cluster.sandbox.tokenizer import Tokenized
from cluster.transport.parsing_thread import PARSING
from cluster.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and its deadline.

    ``client`` names the caller for fair queueing and cached prefixes. ``deadline`` is in seconds of the monotonic
    clock; None means no deadline. ``default_max_tokens`` applies if the request has no max_tokens; None means as many
    as the context allows.
    """

    client: str
    deadline: float | None
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS


async def generate_request(message: pb.GenerateRequest, checkpoint: ModelInfo, caller: Caller) -> Request:
    """Build the request for a prompt. Raises ``InvalidRequest`` or ``PromptTooLong``."""
    if message.WhichOneof("prompt") == "tokens":
        prompt = await PARSING.run(message.ByteSize(), _check_ids, message.tokens.ids, checkpoint)
    else:
        context = checkpoint.shape.max_context
        check_size("prompt has", utf8_size(message.text), context, "prompt")
        tokenized = await checkpoint.text.encode(message.text, context)
        prompt = _check_length(tokenized, checkpoint)
    if not prompt:
        raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
    return _request(message, prompt, grammar(message.grammar), checkpoint, caller)


async def chat_request(message: pb.ChatRequest, checkpoint: ModelInfo, caller: Caller) -> Request:
    """Build the request for a conversation. Raises ``InvalidRequest`` or ``PromptTooLong``."""
    answer_grammar = grammar(message.grammar)
    context = checkpoint.shape.max_context
    conversation, options = await PARSING.run(message.ByteSize(), read_conversation, message, context)
    tokenized = await checkpoint.text.converse(conversation, options, answer_grammar, context)
    prompt = _check_length(tokenized, checkpoint)
    request = _request(message, prompt, tokenized.grammar, checkpoint, caller)
    return replace(request, parsing=Parsing(options.offered, tokenized.thinking))


def read_conversation(
    message: pb.ChatRequest | pb.TokenizeRequest, context: int
) -> tuple[tuple[ChatMessage, ...], ChatOptions]:
    """Decode and check a conversation and its options. Raises as ``check_messages`` and ``check_options``."""
    conversation = messages(message.messages)
    options = template_options(message.template)
    check_messages(conversation, context)
    check_options(options)
    return conversation, options


async def count_tokens(message: pb.TokenizeRequest, checkpoint: ModelInfo) -> int:
    """Count the tokens of a text, or of a conversation rendered with the model's chat template."""
    return (await _tokenize(message, checkpoint, 0, texts=False)).count


async def tokenize_bounded(message: pb.TokenizeRequest, checkpoint: ModelInfo) -> Tokenized:
    """Return at most ``MAX_TOLD_TOKENS`` tokens, each with its text. Raises ``InvalidRequest`` if there are more."""
    tokenized = await _tokenize(message, checkpoint, MAX_TOLD_TOKENS, texts=True)
    if tokenized.count > MAX_TOLD_TOKENS:
        raise InvalidRequest(
            f"the input has {tokenized.count} tokens; at most {MAX_TOLD_TOKENS} can be listed; send a shorter input",
            field="messages" if message.messages else "text",
        )
    return tokenized


async def _tokenize(message: pb.TokenizeRequest, checkpoint: ModelInfo, max_tokens: int, *, texts: bool) -> Tokenized:
    if message.messages and message.text:
        raise InvalidRequest("both text and messages were given; send one of them", field="messages")
    context = max(checkpoint.shape.max_context, MAX_TOLD_TOKENS)  # more tokens than are served are counted too
    if message.messages:
        conversation, options = await PARSING.run(message.ByteSize(), read_conversation, message, context)
        return await checkpoint.text.converse(conversation, options, None, max_tokens, texts=texts)
    check_size("text has", utf8_size(message.text), context, "text")
    return await checkpoint.text.encode(message.text, max_tokens, texts=texts)


def _check_length(tokenized: Tokenized, checkpoint: ModelInfo) -> tuple[int, ...]:
    """Return the prompt's ids. Raises ``PromptTooLong`` if they leave no room for an answer."""
    _max_answer_tokens(tokenized.count, checkpoint.shape.max_context)
    return tokenized.ids


def _check_ids(ids: Sequence[int], checkpoint: ModelInfo) -> tuple[int, ...]:
    """Return the token ids of a prompt, counted before they are copied.

    Raises ``InvalidRequest`` for an id outside the vocabulary, or ``PromptTooLong``.
    """
    _max_answer_tokens(len(ids), checkpoint.shape.max_context)
    prompt = tuple(ids)
    size = checkpoint.vocabulary
    largest = max(prompt, default=0)
    if largest >= size:
        raise InvalidRequest(f"the prompt has the token id {largest}; the model has {size} tokens", field="prompt")
    return prompt


def _request(
    message: pb.GenerateRequest | pb.ChatRequest,
    prompt: tuple[int, ...],
    answer_grammar: Grammar | None,
    checkpoint: ModelInfo,
    caller: Caller,
) -> Request:
    if len(message.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(f"the request id is longer than {MAX_REQUEST_ID_CHARS} characters", field="request_id")
    if not message.request_id.isprintable():  # it is logged: a line break in it could forge a log line
        raise InvalidRequest("the request id has characters that cannot be printed", field="request_id")
    if message.samples > MAX_SAMPLES:
        raise InvalidRequest(
            f"{message.samples} samples were requested; at most {MAX_SAMPLES} are allowed", field="samples"
        )
    if answer_grammar and message.stop.ignore_eos:
        raise InvalidRequest(
            "ignore_eos cannot be used with a grammar, which ends the answer itself; leave ignore_eos out",
            field="ignore_eos",
        )
    if message.priority > MAX_PRIORITY:
        raise InvalidRequest(f"priority is {message.priority}; it must be from 0 to {MAX_PRIORITY}", field="priority")
    return Request(
        id=message.request_id or f"req-{secrets.token_hex(8)}",
        prompt=prompt,
        sampling=sampling_params(message.sampling, checkpoint.vocabulary, answer_grammar),
        max_tokens=_max_tokens(message.stop, len(prompt), checkpoint.shape.max_context, caller.default_max_tokens),
        stop=stop_strings(message.stop),
        ignore_eos=message.stop.ignore_eos,
        deadline=caller.deadline,
        client=caller.client,
        priority=message.priority,
        samples=max(message.samples, 1),
        stage_timings=message.stage_timings,
    )


def _max_tokens(stop: pb.StopOptions, prompt: int, context: int, default: int | None) -> int:
    """Return the maximum length of the answer in tokens.

    Raises ``PromptTooLong`` if the requested length does not fit; it is never shortened.
    """
    room = _max_answer_tokens(prompt, context)
    if not stop.HasField("max_tokens"):
        return min(default or room, room)
    if stop.max_tokens < 1:
        raise InvalidRequest("max_tokens is 0; it must be at least 1", field="max_tokens")
    if stop.max_tokens > room:
        raise PromptTooLong(
            f"prompt ({prompt}) and max_tokens ({stop.max_tokens}) need {prompt + stop.max_tokens} tokens, but the "
            f"context has {context}; ask for at most {room}, or serve with a larger --max-context",
            field="max_tokens",
        )
    return int(stop.max_tokens)


def _max_answer_tokens(prompt: int, context: int) -> int:
    """Return the tokens left for an answer. Raises ``PromptTooLong`` if there are none."""
    if prompt >= context:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens, the context {context}, so no answer fits; shorten the prompt, or serve "
            "with a larger --max-context",
            field="prompt",
        )
    return context - prompt
