"""The bodies of POST /v1/embeddings and of Ollama's /api/embed and /api/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cluster.api.embeddings import embedding_params
from cluster.api.http.body import Form, Hint, Ignored, ShortText, Text, hint
from cluster.api.http.completions_form import Prompt
from cluster.api.http.sampling_form import Positive
from cluster.api.limits import MAX_ELEMENTS, MAX_EMBEDDED
from cluster.api.requests import GenerateParams
from cluster.core.limits import MAX_PROMPT_IDS


class EmbeddingsForm(Form):
    """The body of /v1/embeddings. Each input is a text or a list of token ids."""

    most_commas: ClassVar[int] = MAX_ELEMENTS + MAX_PROMPT_IDS

    model: ShortText | None = None
    input: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_EMBEDDED, fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: Hint = None

    @property
    def inputs(self) -> list[Any]:
        """The inputs as a list. An empty list is one input without tokens, which validation rejects."""
        if isinstance(self.input, str) or not self.input or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)

    def params(self, request_id: str) -> list[GenerateParams]:
        """Translate the body, once for each input."""
        return embedding_params(request_id, self.inputs)


class OllamaEmbedForm(Form):
    """The body of /api/embed. Too long a text is refused rather than cut."""

    model: Annotated[ShortText, Field(min_length=1)]
    input: Text | Annotated[list[Text], Field(max_length=MAX_EMBEDDED, fail_fast=True)]
    dimensions: Positive | None = None
    truncate: Annotated[bool | None, hint("truncate")] = None
    options: Hint = None
    keep_alive: Hint = None

    def params(self, request_id: str) -> list[GenerateParams]:
        """Translate the body, once for each text."""
        return embedding_params(request_id, [self.input] if isinstance(self.input, str) else self.input)


class OllamaEmbeddingsForm(Form):
    """The body of /api/embeddings, which /api/embed has replaced."""

    model: Annotated[ShortText, Field(min_length=1)]
    prompt: Text
    options: Hint = None
    keep_alive: Hint = None
    truncate: Ignored = None

    def params(self, request_id: str) -> list[GenerateParams]:
        """Translate the body."""
        return embedding_params(request_id, [self.prompt])
