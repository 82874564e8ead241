"""POST /v1/completions: continues prompts. Several prompts in one request are answered concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeAlias

from starlette.requests import Request

from cluster.api.http.answer_assembly import (
    CollectedAnswer,
    add_usage,
    charge_answer,
    collect_answers,
    held_size,
    openai_usage,
    sum_usage,
)
from cluster.api.http.answer_submission import AnswerSubmission
from cluster.api.http.body import build, charge_of, form_size, read
from cluster.api.http.caller_identity import caller_of
from cluster.api.http.chat import ChunkHead
from cluster.api.http.chat_submission import submit_prepared
from cluster.api.http.completions_form import DEFAULT_MAX_TOKENS, CompletionsForm
from cluster.api.http.errors import openai_error
from cluster.api.http.json_response import LongJson, encode_text
from cluster.api.http.logprobs import EchoedPrompt, collected_columns, columns, columns_row
from cluster.api.http.model_names import ModelNames
from cluster.api.http.passed_answer import answer_id, answer_time
from cluster.api.http.sse import COMMENT, DONE, EventStream, event, while_connected
from cluster.api.request_service import RequestService, RunningRequest
from cluster.api.request_validation import check_prompt_logprobs, generate_request
from cluster.api.requests import rename_fields
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import MacpipeError
from cluster.core.request import FinishEvent, PromptLogprobs, TokenEvent, Usage
from cluster.transport.byte_budget import Charge

KIND = "text_completion"
PromptEvent: TypeAlias = tuple[int, PromptLogprobs | TokenEvent | FinishEvent]
"""An event of a prompt, with the prompt's number."""


@dataclass(frozen=True, slots=True)
class Completions:
    """The route's handler."""

    service: RequestService
    names: ModelNames

    async def __call__(self, request: Request) -> LongJson | EventStream[PromptEvent]:
        form = await read(request, CompletionsForm)
        head = ChunkHead(answer_id(request, "cmpl-"), int(answer_time(request)), self.names.requested_name(form.model))
        encoder = CompletionsEncoder(head, form)
        submission = AnswerSubmission(
            self.names,
            request,
            form.model,
            head.id,
            check=lambda: form.params(head.id),
            submit_to=lambda model_info: self._submit(form, head.id, model_info, request),
            events_of=_merge_events,
        )
        if form.stream:
            return await submission.stream(encoder)
        encoder.attach(*await submission.submit())
        charge = charge_of(request)
        return LongJson(await while_connected(request, lambda: encoder.whole(charge)))

    async def _submit(
        self, form: CompletionsForm, request_id: str, model_info: ModelInfo, request: Request
    ) -> list[RunningRequest]:
        """Submit all prompts. If one is rejected, end those that were accepted and raise its error."""
        all_params = await build(request, lambda: form.params(request_id))
        with rename_fields(form.field_names()):
            caller = caller_of(request, DEFAULT_MAX_TOKENS)
            requests = [await generate_request(params, form_size(request), model_info, caller) for params in all_params]
            if form.prompt_logprobs is not None:
                check_prompt_logprobs(
                    sum(len(r.request.prompt) for r in requests) * (1 + form.prompt_logprobs) * form.samples
                )
            async with AsyncExitStack() as undo:
                all_running = []
                for one in requests:
                    running = await submit_prepared(self.service, request, one.request, model_info)
                    undo.push_async_callback(running.all_events.aclose)
                    all_running.append(running)
                undo.pop_all()
        return all_running


@dataclass(slots=True)
class CompletionsEncoder:
    """Encodes the answers to all prompts; choice ``p * n + i`` is sample i of prompt p."""

    head: ChunkHead
    form: CompletionsForm
    all_running: Sequence[RunningRequest] = ()
    _began_early: bool = False
    """Whether the stream began before the prompts were known, so that their texts have yet to come."""
    _usage: Usage = field(default_factory=lambda: Usage(0, 0))
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters so far, by choice."""
    _prompt_texts: dict[str, str] = field(default_factory=dict)
    """Text of each prompt that is echoed without log-probabilities, by its request."""
    _echoed: list[EchoedPrompt] = field(default_factory=list)
    """The prompts whose log-probabilities are reported; empty if none are."""

    def attach(self, running: Sequence[RunningRequest], model: str) -> None:
        self.all_running = running
        self.head = replace(self.head, model=model)
        if self.form.prompt_logprobs is not None:
            self._echoed = [EchoedPrompt(one) for one in running]

    async def whole(self, charge: Charge) -> dict[str, Any]:
        """Return the body of a response that is not streamed. Raises the first error that ended an answer early."""
        try:
            async with asyncio.TaskGroup() as tasks:
                gathered = [tasks.create_task(self._collect(p, charge)) for p in range(len(self.all_running))]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        answers = [task.result() for task in gathered]
        choices = [
            await self._choice(p, i, whole) for p, wholes in enumerate(answers) for i, whole in enumerate(wholes)
        ]
        usage = openai_usage(reduce(add_usage, (sum_usage(w.finish for w in wholes) for wholes in answers)))
        return {**self.head.fields(KIND), "choices": choices, "usage": usage}

    async def _collect(self, prompt: int, charge: Charge) -> list[CollectedAnswer]:
        running = self.all_running[prompt]
        encode = None if self.form.logprobs is None else columns_row
        if not self._echoed:
            charge_answer(charge, self.form.samples * held_size(self._echo(prompt)))
            return await collect_answers(running, charge, encode)
        echoed = self._echoed[prompt]
        echoed.begin()
        return await collect_answers(running, charge, encode, echoed.add)

    async def _choice(self, prompt: int, sample: int, whole: CollectedAnswer) -> dict[str, Any]:
        text, logprobs = self._echo(prompt), None
        if self.form.logprobs is not None:
            echoed = self._echoed[prompt] if self._echoed else None
            logprobs = await collected_columns(whole.rows, whole.offsets, echoed)
        return {
            "index": prompt * self.form.samples + sample,
            "text": await encode_text(text + whole.text),
            "logprobs": logprobs,
            "finish_reason": whole.finish.reason.value if whole.finish else None,
        }

    def _echo(self, prompt: int) -> str:
        """Return the prompt as text if ``echo`` is set, else an empty text. It is decoded once for all samples."""
        if self._echoed:
            return self._echoed[prompt].text
        running = self.all_running[prompt]
        request_id = running.request.id
        if self.form.echo and request_id not in self._prompt_texts:
            self._prompt_texts[request_id] = running.model_info.tokenizer.decode(running.request.prompt)
        return self._prompt_texts.get(request_id, "")

    def begin(self) -> Iterator[bytes]:
        if self.all_running:
            yield from self._begin_prompts()
        else:
            self._began_early = True
            yield self._chunk(0, "")

    def _begin_prompts(self) -> Iterator[bytes]:
        self._began_early = False
        for p in range(len(self.all_running) if self.form.echo else 0):
            text, logprobs = self._echoed[p].begin() if self._echoed else (self._echo(p), None)
            yield from self._prompt_chunks(p, text, logprobs)

    def _prompt_chunks(self, prompt: int, text: str, logprobs: dict[str, Any] | None) -> Iterator[bytes]:
        """Yield a piece of the prompt for each of its samples."""
        for index in range(prompt * self.form.samples, (prompt + 1) * self.form.samples):
            self._offsets[index] = self._offsets.get(index, 0) + len(text) if self._echoed else 0
            yield self._chunk(index, text, logprobs)

    def encode(self, e: PromptEvent) -> Iterator[bytes]:
        if self._began_early:
            yield from self._begin_prompts()
        prompt, of_prompt = e
        if isinstance(of_prompt, PromptLogprobs):
            yield from self._prompt_chunks(prompt, *self._echoed[prompt].add(of_prompt))
            return
        index = prompt * self.form.samples + of_prompt.sample
        tokens = [of_prompt] if isinstance(of_prompt, TokenEvent) else []
        reason = None
        if isinstance(of_prompt, FinishEvent):
            reason = of_prompt.reason.value
            usage = of_prompt.usage
            prompted = usage if of_prompt.sample == 0 else Usage(0, usage.completion_tokens)
            self._usage = add_usage(self._usage, prompted)
            tokens += _end_token(of_prompt) if self._echoed else []
        logprobs = None
        if tokens and self.form.logprobs is not None:
            offset = self._offsets.get(index, 0)
            logprobs = columns(tokens, self.all_running[prompt], offset)
            self._offsets[index] = offset + len(of_prompt.text)
        if of_prompt.text or logprobs or reason:
            yield self._chunk(index, of_prompt.text, logprobs, reason)

    def end(self) -> Iterator[bytes]:
        if self.form.stream_options and self.form.stream_options.include_usage:
            yield event({**self.head.fields(KIND), "choices": [], "usage": openai_usage(self._usage)})
        yield DONE

    def idle(self) -> bytes:
        """Return a comment. While the model is loaded, return a chunk that adds nothing: some clients count these."""
        return COMMENT if self.all_running else self._chunk(0, "")

    def fail(self, error: MacpipeError) -> bytes:
        return event(openai_error(error))

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event({**self.head.fields(KIND), "choices": [choice]})


def _end_token(finish: FinishEvent | None) -> list[TokenEvent]:
    """Return the end-of-sequence token of an answer as a list, empty if something else ended it.

    The columns of an echoed prompt include it, as OpenAI's do: evaluations drop the last entry as the generated token.
    """
    return [finish.end] if finish and finish.end else []


@asynccontextmanager
async def _merge_events(
    all_running: Sequence[RunningRequest],
) -> AsyncIterator[AsyncGenerator[PromptEvent, None]]:
    """Merge the events of all prompts in the order of arrival, each with its prompt's number.

    The first error ends all prompts. The queue holds at most one event per prompt, so that a slow reader slows the
    prompts down and their own bounds apply.
    """
    merged: asyncio.Queue[tuple[int, PromptLogprobs | TokenEvent | FinishEvent | Exception | None]] = asyncio.Queue(
        len(all_running)
    )

    async def pump(number: int, running: RunningRequest) -> None:
        try:
            async with aclosing(running.all_events) as events:
                async for e in events:
                    await merged.put((number, e))
            await merged.put((number, None))
        except Exception as e:  # the reader raises it, which ends the other prompts
            await merged.put((number, e))

    async def events() -> AsyncGenerator[PromptEvent, None]:
        left = len(all_running)
        while left:
            number, e = await merged.get()
            if isinstance(e, Exception):
                raise e
            if e is None:
                left -= 1
                continue
            yield number, e

    pumps = [asyncio.create_task(pump(i, running)) for i, running in enumerate(all_running)]
    try:
        yield events()
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
