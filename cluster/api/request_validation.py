"""Turns parameters into a tokenized request that fits the context, or raises an error that names the parameter.

``size`` is that of the client's form in bytes: what takes long for a large one is done in the thread for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from cluster.api.conversation_validation import check_messages, check_options, check_size
from cluster.api.requests import AnswerParams, Caller, ChatParams, Conversation, GenerateParams, PreparedRequest
from cluster.api.sampling_validation import sampling_params, stop_strings
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest, PromptTooLong
from cluster.core.limits import (
    MAX_LISTED_TOKENS,
    MAX_PRIORITY,
    MAX_PROMPT_LOGPROBS,
    MAX_REQUEST_ID_CHARS,
    MAX_SAMPLES,
    MAX_TOP_LOGPROBS,
)
from cluster.core.request import Grammar, GrammarKind, Parsing, Request, utf8_size
from cluster.sandbox.sandboxed_tokenizer import Tokenized
from cluster.transport.parsing_thread import PARSING


async def generate_request(params: GenerateParams, size: int, model_info: ModelInfo, caller: Caller) -> PreparedRequest:
    """Build the request for a prompt. Raises ``InvalidRequest`` or ``PromptTooLong``."""
    if isinstance(params.prompt, str):
        context = model_info.shape.max_context
        check_size("prompt has", utf8_size(params.prompt), context, "prompt")
        tokenized = await model_info.text.encode(params.prompt, context)
        prompt = _check_length(tokenized, model_info)
    else:
        prompt = await PARSING.run(size, _check_ids, params.prompt, model_info)
    if not prompt:
        raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
    _check_grammar(params.grammar)
    _check_prompt_logprobs(params.prompt_logprobs, len(prompt))
    least_tokens = 1 if params.prompt_logprobs is None else 0
    request = _request(params, prompt, params.grammar, model_info, caller, least_tokens)
    request = replace(request, prompt_logprobs=params.prompt_logprobs, embeds=params.embeds)
    return await _predict(params, PreparedRequest(request), model_info, caller)


async def chat_request(params: ChatParams, size: int, model_info: ModelInfo, caller: Caller) -> PreparedRequest:
    """Build the request for a conversation.

    Raises ``InvalidRequest`` or ``PromptTooLong``; for a strict caller also if the model's template ignores an option.
    """
    messages, options = params.conversation.messages, params.conversation.options
    context = model_info.shape.max_context
    _check_grammar(params.grammar)
    await PARSING.run(size, check_conversation, params.conversation, context)
    try:
        tokenized = await model_info.text.converse(messages, options, params.grammar, context, owner=caller.client)
    except PromptTooLong as e:
        e.details["maximum"] = str(context - 1)  # the sandbox counts further
        raise
    prompt = _check_length(tokenized, model_info)
    if tokenized.ignored and caller.strict:
        name = tokenized.ignored[0]
        raise InvalidRequest(f"this model's chat template does not support this {name}; leave it out", field=name)
    request = _request(params, prompt, tokenized.grammar, model_info, caller)
    parsing = Parsing(options.offered, tokenized.thinking)
    request = replace(request, parsing=parsing, split_points=tokenized.split_points, borders=tokenized.borders)
    prepared = PreparedRequest(request, ignored=tokenized.ignored)
    return await _predict(params, prepared, model_info, caller)


async def _predict(
    params: AnswerParams, prepared: PreparedRequest, model_info: ModelInfo, caller: Caller
) -> PreparedRequest:
    """Add the tokens of the prediction to a request, if they are of use.

    Raises ``InvalidRequest`` for one that is longer than any answer, and for a strict caller if it has no effect.
    """
    text, context = params.prediction, model_info.shape.max_context
    if not text:
        return prepared
    check_size("prediction has", utf8_size(text), context, "prediction")
    if not (model_info.speculates and params.speculate):
        if caller.strict:
            why = "speculate is false" if model_info.speculates else "this server does not speculate"
            raise InvalidRequest(f"the prediction has no effect, since {why}; leave it out", field="prediction")
        return replace(prepared, ignored=(*prepared.ignored, "prediction"))
    try:
        tokenized = await model_info.text.encode(text, context, special=False)
    except PromptTooLong as e:
        raise _long_prediction(context) from e
    if tokenized.count > context:
        raise _long_prediction(context)
    return replace(prepared, request=replace(prepared.request, prediction=tokenized.ids))


def _long_prediction(context: int) -> InvalidRequest:
    return InvalidRequest(
        f"the prediction is longer than the context of {context} tokens; send the part that the answer may repeat",
        field="prediction",
    )


def check_conversation(conversation: Conversation, context: int) -> None:
    """Check a conversation for a context of so many tokens. Raises as ``check_messages`` and ``check_options``."""
    check_messages(conversation.messages, context)
    check_options(conversation.options)


async def count_tokens(prompt: str | Conversation, size: int, model_info: ModelInfo) -> int:
    """Count the tokens of a text, or of a conversation rendered with the model's chat template."""
    return (await _tokenize(prompt, size, model_info, 0, texts=False)).count


async def list_tokens(prompt: str | Conversation, size: int, model_info: ModelInfo) -> Tokenized:
    """Return at most ``MAX_LISTED_TOKENS`` tokens, each with its text. Raises ``InvalidRequest`` if there are more."""
    tokenized = await _tokenize(prompt, size, model_info, MAX_LISTED_TOKENS, texts=True)
    if tokenized.count > MAX_LISTED_TOKENS:
        raise InvalidRequest(
            f"the input has {tokenized.count} tokens; at most {MAX_LISTED_TOKENS} can be listed; send a shorter input",
            field="prompt" if isinstance(prompt, str) else "messages",
        )
    return tokenized


async def _tokenize(
    prompt: str | Conversation, size: int, model_info: ModelInfo, max_tokens: int, *, texts: bool
) -> Tokenized:
    context = max(model_info.shape.max_context, MAX_LISTED_TOKENS)  # more tokens than are served are counted too
    if isinstance(prompt, str):
        check_size("text has", utf8_size(prompt), context, "prompt")
        return await model_info.text.encode(prompt, max_tokens, texts=texts)
    await PARSING.run(size, check_conversation, prompt, context)
    return await model_info.text.converse(prompt.messages, prompt.options, None, max_tokens, texts=texts)


def _check_grammar(grammar: Grammar | None) -> None:
    if grammar and grammar.kind is not GrammarKind.JSON_OBJECT and not grammar.source.strip():
        raise InvalidRequest(f"the {grammar.kind.value} is empty; send one, or leave it out", field=grammar.kind.value)


def _check_length(tokenized: Tokenized, model_info: ModelInfo) -> tuple[int, ...]:
    """Return the prompt's ids. Raises ``PromptTooLong`` if they leave no room for an answer."""
    _max_answer_tokens(tokenized.count, model_info.shape.max_context)
    return tokenized.ids


def _check_ids(ids: Sequence[int], model_info: ModelInfo) -> tuple[int, ...]:
    """Return the token ids of a prompt, counted before they are copied.

    Raises ``InvalidRequest`` for an id outside the vocabulary, or ``PromptTooLong``.
    """
    _max_answer_tokens(len(ids), model_info.shape.max_context)
    prompt = tuple(ids)
    size = model_info.vocabulary
    largest = max(prompt, default=0)
    if largest >= size:
        raise InvalidRequest(f"the prompt has the token id {largest}; the model has {size} tokens", field="prompt")
    return prompt


def _request(
    params: AnswerParams,
    prompt: tuple[int, ...],
    grammar: Grammar | None,
    model_info: ModelInfo,
    caller: Caller,
    least_tokens: int = 1,
) -> Request:
    max_tokens = _max_tokens(params.max_tokens, len(prompt), model_info.shape.max_context, caller, least_tokens)
    if len(params.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"the request id has {len(params.request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed",
            field="request_id",
        )
    if not params.request_id.isprintable():  # it is logged: a line break in it could forge a log line
        raise InvalidRequest("the request id has characters that cannot be printed; leave them out", field="request_id")
    if params.samples > MAX_SAMPLES:
        raise InvalidRequest(
            f"{params.samples} samples were requested; at most {MAX_SAMPLES} are allowed", field="samples"
        )
    if grammar and params.ignore_eos:
        raise InvalidRequest(
            "ignore_eos cannot be used with a grammar, which ends the answer itself; leave ignore_eos out",
            field="ignore_eos",
        )
    if params.priority > MAX_PRIORITY:
        raise InvalidRequest(f"priority is {params.priority}; it must be from 0 to {MAX_PRIORITY}", field="priority")
    return Request(
        id=params.request_id or f"req-{secrets.token_hex(8)}",
        prompt=prompt,
        sampling=sampling_params(params.sampling, model_info.vocabulary, grammar),
        max_tokens=max_tokens,
        stop=stop_strings(params.stop),
        ignore_eos=params.ignore_eos,
        deadline=caller.deadline,
        client=caller.client,
        priority=params.priority,
        samples=max(params.samples, 1),
        stage_timings=params.stage_timings,
        speculate=params.speculate,
        resumable=params.resumable and bool(params.request_id),
        adapter=model_info.adapter.key if model_info.adapter else "",
    )


def _check_prompt_logprobs(top: int | None, prompt: int) -> None:
    if top is None:
        return
    if top > MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs is {top}; it must be at most {MAX_TOP_LOGPROBS}", field="prompt_logprobs"
        )
    check_prompt_logprobs(prompt * (1 + top))


def check_prompt_logprobs(count: int) -> None:
    """Raise ``InvalidRequest`` if one answer would have more than ``MAX_PROMPT_LOGPROBS`` of them."""
    if count > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"{count} log-probabilities of prompts were requested, alternatives included; at most "
            f"{MAX_PROMPT_LOGPROBS} are allowed; send fewer or shorter prompts, or ask for fewer alternatives",
            field="prompt_logprobs",
        )


def _max_tokens(asked: int | None, prompt: int, context: int, caller: Caller, least: int) -> int:
    """Return the maximum length of the answer in tokens.

    Raises ``PromptTooLong`` if the requested length does not fit and the caller does not let it be shortened.
    """
    room = _max_answer_tokens(prompt, context)
    if asked is None:
        return min(caller.default_max_tokens or room, room)
    if asked < least:
        raise InvalidRequest(
            "max_tokens is 0; it must be at least 1, unless log-probabilities of the prompt are requested",
            field="max_tokens",
        )
    if asked > room and caller.shorten:
        return room
    if asked > room:
        raise PromptTooLong(
            f"prompt ({prompt}) and max_tokens ({asked}) need {prompt + asked} tokens, but the "
            f"context has {context}; ask for at most {room}, or serve with a larger --max-context",
            field="max_tokens",
            tokens=str(prompt),
            max_tokens=str(asked),
            context=str(context),
        )
    return asked


def _max_answer_tokens(prompt: int, context: int) -> int:
    """Return the tokens left for an answer. Raises ``PromptTooLong`` if there are none."""
    if prompt >= context:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens and the context holds {context}, so no answer fits; shorten it, or serve "
            "with a larger --max-context",
            field="prompt",
            tokens=str(prompt),
            maximum=str(context - 1),
        )
    return context - prompt
