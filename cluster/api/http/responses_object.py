"""Encodes the response object of /v1/responses and its items, in every state of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.api.http.errors import openai_error
from cluster.api.http.json_response import Encoded
from cluster.api.http.responses_form import ResponsesForm, ResponsesNamedTool
from cluster.core.errors import MacpipeError
from cluster.core.request import FinishEvent, FinishReason, Usage

NO_LOGPROBS: Final = Encoded("[]")


@dataclass(frozen=True, slots=True)
class ResponseEncoder:
    """Encodes the response with this id to a form; ``created_at`` is in Unix seconds."""

    form: ResponsesForm
    id: str
    model: str
    created_at: int

    def begin_object(self, status: str = "in_progress") -> dict[str, Any]:
        """Return the object without output."""
        return self._object(status, [], None)

    def finish_object(
        self, items: Sequence[dict[str, Any]], finish: FinishEvent, reasoning_tokens: int
    ) -> dict[str, Any]:
        """Return the final object: completed, or incomplete if the maximum length ended it."""
        usage = encode_usage(finish.usage, reasoning_tokens)
        if finish.reason is FinishReason.LENGTH:
            cut = self._object("incomplete", items, usage)
            return cut | {"incomplete_details": {"reason": "max_output_tokens"}}
        return self._object("completed", items, usage)

    @staticmethod
    def item_status(finish: FinishEvent) -> str:
        """Return the status of the last item: incomplete if the maximum length ended the answer."""
        return "incomplete" if finish.reason is FinishReason.LENGTH else "completed"

    def fail_object(self, items: Sequence[dict[str, Any]], error: MacpipeError) -> dict[str, Any]:
        """Return the object of a response that an error ended."""
        body = openai_error(error)["error"]
        return self._object("failed", items, None) | {"error": {"code": body["code"], "message": body["message"]}}

    def _object(self, status: str, items: Sequence[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        form = self.form
        effort = form.reasoning.effort if form.reasoning else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "model": self.model,
            "output": list(items),
            "usage": usage,
            "error": None,
            "incomplete_details": None,
            "instructions": form.instructions,
            "max_output_tokens": form.max_output_tokens,
            "metadata": form.metadata or {},
            "parallel_tool_calls": form.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": 1.0 if form.temperature is None else form.temperature,
            "top_p": 1.0 if form.top_p is None else form.top_p,
            "text": {"format": self._format()},
            "tool_choice": self._choice(),
            "tools": [t.model_dump(exclude_none=True) for _, t in form.functions],
            "truncation": "disabled",
        }

    def _format(self) -> dict[str, Any]:
        requested = self.form.text.format if self.form.text else None
        return requested.model_dump(by_alias=True, exclude_none=True) if requested else {"type": "text"}

    def _choice(self) -> object:
        choice = self.form.tool_choice
        return choice.model_dump() if isinstance(choice, ResponsesNamedTool) else choice or "auto"

    def reasoning(self, item_id: str, text: str | Encoded, status: str = "completed") -> dict[str, Any]:
        """Return a reasoning item. It is not encrypted, so that clients can send it back with the next request."""
        content = [{"type": "reasoning_text", "text": text}] if status != "in_progress" else []
        return {"id": item_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def message(
        self, item_id: str, text: str | Encoded, logprobs: Encoded = NO_LOGPROBS, status: str = "completed"
    ) -> dict[str, Any]:
        """Return a message item of the assistant."""
        content = [output_text(text, logprobs)] if status != "in_progress" else []
        return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def call(
        self, item_id: str, call_id: str, name: str, text: str | Encoded, status: str = "completed"
    ) -> dict[str, Any]:
        """Return a function call item; ``text`` holds its arguments."""
        return {
            "id": item_id,
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": text,
            "status": status,
        }


def output_text(text: str | Encoded, logprobs: Encoded = NO_LOGPROBS) -> dict[str, Any]:
    """Return a text part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def encode_usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """Return the usage object with this endpoint's names."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
