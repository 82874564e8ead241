"""POST /tokenize and /v1/messages/count_tokens: the tokens of a prompt, without running the model."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from cluster.api import request_validation
from cluster.api.http.answer_assembly import fields_named
from cluster.api.http.body import Form, ShortText, Text, build, read
from cluster.api.http.chat_form import FunctionTools, MessageList, messages_of
from cluster.api.http.json_response import Json
from cluster.api.http.messages_form import CountForm
from cluster.api.http.model_names import ModelNames, model_id
from cluster.api.http.openai_formats import tool_of
from cluster.core.errors import InvalidRequest
from cluster.v1 import inference_pb2 as pb


class TokenizeForm(Form):
    """The body of /tokenize: either a text or a conversation in the format of chat completions."""

    model: ShortText | None = None
    prompt: Text | None = None
    messages: MessageList | None = None
    tools: FunctionTools | None = None

    def message(self) -> pb.TokenizeRequest:
        """Translate the body into a request. Raises ``InvalidRequest``, naming the field."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", field="prompt")
        if self.tools and not self.messages:
            raise InvalidRequest("tools require messages; add messages or leave tools out", field="tools")
        tools = [tool_of(t.function, f"tools[{i}].function") for i, t in enumerate(self.tools or ())]
        return pb.TokenizeRequest(
            text=self.prompt or "",
            messages=messages_of(self.messages or ()),
            template=pb.TemplateOptions(tools=tools),
        )


@dataclass(frozen=True, slots=True)
class Tokenize:
    """The handlers of both routes."""

    names: ModelNames

    async def tokens(self, request: Request) -> Json:
        """Return the token ids and the text of each."""
        form = await read(request, TokenizeForm)
        checkpoint = self.names.checkpoint(form.model)
        with fields_named({"text": "prompt"}):
            message = await build(request, form.message)
            tokenized = await request_validation.tokenize_bounded(message, checkpoint)
        return Json(
            {
                "model": model_id(checkpoint),
                "count": tokenized.count,
                "context_length": checkpoint.shape.max_context,
                "tokens": tokenized.ids,
                "texts": tokenized.texts,
            }
        )

    async def count(self, request: Request) -> Json:
        """Return the number of prompt tokens, in Anthropic's format."""
        form = await read(request, CountForm)
        checkpoint = self.names.checkpoint(form.model)
        with fields_named({"template": "thinking"}):
            chat = await build(request, form.conversation)
            message = pb.TokenizeRequest(messages=chat.messages, template=chat.template)
            count = await request_validation.count_tokens(message, checkpoint)
        return Json({"input_tokens": count})
