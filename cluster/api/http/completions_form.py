"""POST /v1/completions as clients send it, and its translation into requests that gRPC takes, one a prompt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from cluster.api.bounds import MAX_ELEMENTS, MAX_PROMPT_IDS
from cluster.api.http.body import Ignored, ShortText, Text, Unsupported
from cluster.api.http.chat_form import ChatStreamOptions
from cluster.api.http.openai_formats import ResponseFormat, grammar_of
from cluster.api.http.sampling_form import Count, SamplingForm
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_ANSWERS, MAX_PROMPTS, MAX_SAMPLES, MAX_TOP_LOGPROBS
from cluster.v1 import inference_pb2 as pb

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's, on this endpoint."""
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
Prompt = Text | Annotated[list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]


class CompletionsForm(SamplingForm):
    """The body. Beside OpenAI's fields: top_k, min_p, repetition_penalty, ignore_eos, response_format, priority."""

    most_commas: ClassVar[int] = MAX_ELEMENTS + MAX_PROMPT_IDS

    model: ShortText | None = None
    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: ChatStreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: Annotated[Count, Field(le=9)] = 0
    user: Ignored = None
    suffix: Unsupported = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def prompts(self) -> list[Prompt]:
        """One prompt or several, as several. An empty list is one prompt of no tokens, which the intake refuses."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # a list of ids
        return self.prompt

    def check(self) -> None:
        """Raises ``InvalidRequest`` for fields that do not go together."""
        if self.best_of is not None and self.best_of != self.samples:
            raise InvalidRequest("best_of other than n is not supported here; leave it out", field="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("the prompt has no logprobs here; leave out echo or logprobs", field="echo")
        if self.stream_options and not self.stream:
            raise InvalidRequest("stream_options were given without stream", field="stream_options")
        if len(self.prompts) * self.samples > MAX_ANSWERS:
            raise InvalidRequest(
                f"{len(self.prompts)} prompts with {self.samples} answers each; at most {MAX_ANSWERS} in all", field="n"
            )

    def messages(self, request_id: str) -> list[pb.GenerateRequest]:
        """A request for each prompt. Raises ``InvalidRequest``, naming the field."""
        self.check()
        prompts = self.prompts
        ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
        return [self._message(*each) for each in zip(ids, prompts, strict=True)]

    def _message(self, request_id: str, prompt: Prompt) -> pb.GenerateRequest:
        sampling = self.sampling_options()
        sampling.logprobs, sampling.top_logprobs = self.logprobs is not None, self.logprobs or 0
        message = pb.GenerateRequest(
            request_id=request_id,
            sampling=sampling,
            stop=self.stop_options(self.max_tokens),
            priority=self.priority,
            grammar=grammar_of(self.response_format),
            samples=self.samples,
        )
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.tokens.ids.extend(prompt)
        return message
