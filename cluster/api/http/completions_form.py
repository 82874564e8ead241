"""The body of POST /v1/completions, and its translation into parameters, for each of its prompts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from cluster.api.http.body import Hint, ShortText, Text, Unsupported
from cluster.api.http.chat_form import ChatStreamOptions
from cluster.api.http.openai_formats import ResponseFormat, decode_grammar
from cluster.api.http.sampling_form import Count, SamplingForm, stop_list
from cluster.api.limits import MAX_ELEMENTS
from cluster.api.requests import GenerateParams, grammar_names
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_ANSWERS, MAX_PROMPT_IDS, MAX_PROMPTS, MAX_SAMPLES, MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's default for this endpoint."""
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
Prompt = Text | Annotated[list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]


class CompletionsForm(SamplingForm):
    """The body.

    It adds to OpenAI's fields: top_k, min_p, repetition_penalty, ignore_eos, response_format, priority, speculate.
    """

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
    user: Hint = None
    suffix: Unsupported = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts as a list. An empty list is one prompt without tokens, which validation rejects."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # a list of ids
        return self.prompt

    def check(self) -> None:
        """Raise ``InvalidRequest`` for fields that cannot be combined."""
        if self.best_of is not None and self.best_of != self.samples:
            raise InvalidRequest("best_of must equal n; leave it out", field="best_of")
        if self.stream_options and not self.stream:
            raise InvalidRequest("stream_options requires stream to be true", field="stream_options")
        if len(self.prompts) * self.samples > MAX_ANSWERS:
            raise InvalidRequest(
                f"{len(self.prompts)} prompts with {self.samples} answers each are too many; "
                f"send at most {MAX_ANSWERS} answers in total",
                field="n",
            )

    @property
    def prompt_logprobs(self) -> int | None:
        """The alternatives to report for each token of an echoed prompt; None if no log-probabilities are asked for."""
        return self.logprobs if self.echo else None

    def field_names(self) -> dict[str, str]:
        """Map parameters to this form's fields."""
        return {
            "samples": "n",
            "top_logprobs": "logprobs",
            "prompt_logprobs": "logprobs",
            **grammar_names("response_format"),
        }

    def params(self, request_id: str) -> list[GenerateParams]:
        """Translate the body, once for each prompt. Raises ``InvalidRequest``, naming the field."""
        self.check()
        prompts = self.prompts
        ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
        return [self._prompt_params(one_id, prompt) for one_id, prompt in zip(ids, prompts, strict=True)]

    def _prompt_params(self, request_id: str, prompt: Prompt) -> GenerateParams:
        return GenerateParams(
            request_id=request_id,
            prompt=prompt,
            sampling=self.sampling_options(logprobs=self.logprobs is not None, top_logprobs=self.logprobs or 0),
            max_tokens=self.max_tokens,
            stop=stop_list(self.stop),
            ignore_eos=self.ignore_eos,
            priority=self.priority,
            samples=self.samples,
            grammar=decode_grammar(self.response_format),
            speculate=self.speculate is not False,
            prompt_logprobs=self.prompt_logprobs,
        )
