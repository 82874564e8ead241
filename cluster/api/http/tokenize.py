"""POST /tokenize and /v1/messages/count_tokens: the tokens of a prompt, without running the model."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from cluster.api.http.body import Form, ShortText, Text, build, form_size, read
from cluster.api.http.chat_form import FunctionTools, MessageList, decode_messages
from cluster.api.http.json_response import Json
from cluster.api.http.messages_form import CountForm
from cluster.api.http.model_names import ModelNames
from cluster.api.http.openai_formats import decode_tool
from cluster.api.request_validation import count_tokens, list_tokens
from cluster.api.requests import Conversation, rename_fields
from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatOptions


class TokenizeForm(Form):
    """The body of /tokenize: either a text or a conversation in the format of chat completions."""

    model: ShortText | None = None
    prompt: Text | None = None
    messages: MessageList | None = None
    tools: FunctionTools | None = None

    def params(self) -> str | Conversation:
        """Return the text or the conversation to tokenize. Raises ``InvalidRequest``, naming the field."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give exactly one of prompt and messages", field="prompt")
        if self.tools and not self.messages:
            raise InvalidRequest("tools require messages; add messages or leave tools out", field="tools")
        if self.messages is None:
            return self.prompt or ""
        tools = tuple(decode_tool(t.function, f"tools[{i}].function") for i, t in enumerate(self.tools or ()))
        return Conversation(decode_messages(self.messages), ChatOptions(tools=tools))


@dataclass(frozen=True, slots=True)
class Tokenize:
    """The handlers of both routes."""

    names: ModelNames

    async def tokens(self, request: Request) -> Json:
        """Return the token ids and the text of each."""
        form = await read(request, TokenizeForm)
        prompt = await build(request, form.params)
        async with self.names.hold_tokenizer(form.model) as model_info:
            tokenized = await list_tokens(prompt, form_size(request), model_info)
        return Json(
            {
                "model": self.names.id_of(model_info),
                "count": tokenized.count,
                "context_length": model_info.shape.max_context,
                "tokens": tokenized.ids,
                "texts": tokenized.texts,
            }
        )

    async def count(self, request: Request) -> Json:
        """Return the number of prompt tokens, in Anthropic's format."""
        form = await read(request, CountForm)
        conversation = await build(request, form.conversation)
        async with self.names.hold_tokenizer(form.model) as model_info:
            with rename_fields(form.field_names()):
                count = await count_tokens(conversation, form_size(request), model_info)
        return Json({"input_tokens": count})
