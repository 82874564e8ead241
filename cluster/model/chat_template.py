"""Renders conversations with the model's own chat template, including tools and template arguments.

An argument that the template does not use is rejected by name: otherwise the model would, for example, never see the
tools and answer as if there were none. A hint, such as the reasoning effort, is ignored instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from mlx_lm.tokenizer_utils import TokenizerWrapper

from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_RENDERED_CHARS
from cluster.core.request import ChatMessage, ChatOptions, Tool
from cluster.model.conversation import fit_messages, message_fields
from cluster.model.known_prompts import KnownPrompts
from cluster.model.output_markers import OutputMarkers
from cluster.model.panics import panics_raised_as
from cluster.model.prompt_length import require_at_most
from cluster.model.rendered_prompt import RenderedPrompt
from cluster.model.split_points import SplitPoints, find_split_points
from cluster.model.template_abilities import CallForm, TemplateAbilities

__all__ = ["ChatTemplate", "describe_tool"]

OURS: Final = frozenset(
    {"messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"chat_template", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"}
    | {"padding", "truncation", "max_length", "enable_thinking", "thinking", "reasoning_effort"}
)
"""Template arguments that clients may not set, or that have their own request field."""


class ChatTemplate:
    """The template of one tokenizer."""

    def __init__(self, wrapper: TokenizerWrapper, markers: OutputMarkers) -> None:
        self._wrapper = wrapper
        self._markers = markers
        self._names = _names(wrapper)
        self._known = KnownPrompts(wrapper)
        self._abilities = TemplateAbilities(self._probe)

    def render(
        self, messages: Sequence[ChatMessage], options: ChatOptions, most: int | None, owner: str
    ) -> RenderedPrompt:
        """Return the prompt, up to the start of the answer. Raises as ``Tokenizer.chat``.

        What it shares with an earlier prompt of the same owner is not tokenized again; "" keeps none.
        """
        if not self._wrapper.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template; send it raw text instead (completions, or generate --raw)",
                field="messages",
            )
        self.require_tools(options)
        if any(m.tool_calls for m in messages) and not self._takes("tool_calls"):
            raise InvalidRequest(
                "this model's chat template does not support tool calls; leave them out of the messages",
                field="messages",
            )
        arguments = self._arguments(options)
        written = self._fields(messages)
        try:
            text = self._apply(written, arguments)
        except MemoryError:  # the sandbox reports its memory limit itself
            raise
        except Exception as error:  # a template is a program that comes with the model: it can raise anything
            why = str(error)[:1000] or type(error).__name__
            raise InvalidRequest(f"the model's chat template rejects the messages: {why}", field="messages") from error
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidRequest(
                f"the rendered messages have {len(text)} characters; at most {MAX_RENDERED_CHARS} are allowed; "
                "make them shorter",
                field="messages",
            )
        with panics_raised_as(InvalidRequest("the model's tokenizer fails on these messages", field="messages")):
            if most is not None:
                require_at_most(most, text, partial(self._wrapper.encode, add_special_tokens=False), "messages")
            return self._known.tokenize(text, owner)

    def find_split_points(
        self, messages: Sequence[ChatMessage], options: ChatOptions, prompt: RenderedPrompt
    ) -> SplitPoints:
        """Return where later prompts may part from ``prompt``, which ``render`` returned for the same conversation."""
        arguments = self._arguments(options)

        def render(some: Sequence[ChatMessage], starts_answer: bool) -> str | None:
            return self._probe(self._fields(some), **arguments, add_generation_prompt=starts_answer)

        with panics_raised_as(InvalidRequest("the model's tokenizer fails on these messages", field="messages")):
            tools = [tool.name for tool in options.offered]
            return find_split_points(messages, tools, prompt.text, render, prompt.tokens_before)

    def _arguments(self, options: ChatOptions) -> dict[str, Any]:
        arguments = {**self._thinking_fields(options), **self._effort(options), **self._further(options)}
        if options.offered:
            arguments["tools"] = [describe_tool(tool) for tool in options.offered]
        return arguments

    def _fields(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        fitted = fit_messages(messages, self._abilities)
        form = self._abilities.call_form if any(m.tool_calls for m in fitted) else CallForm()
        return [message_fields(message, form) for message in fitted]

    def ignored_options(self, options: ChatOptions) -> tuple[str, ...]:
        """Return the names of the hints that the template does not know."""
        ignored = []
        if not self._can_switch(self._wanted_thinking(options)):
            ignored.append("enable_thinking" if options.enable_thinking is not None else "reasoning_effort")
        if options.reasoning_effort not in ("", "none") and not self._knows_effort(options.reasoning_effort):
            ignored.append("reasoning_effort")
        return tuple(ignored)

    def _apply(self, messages: Sequence[dict[str, Any]], arguments: dict[str, Any]) -> str:
        text: str = self._wrapper.apply_chat_template(  # type: ignore[no-untyped-call]
            list(messages), tokenize=False, **{"add_generation_prompt": True, **arguments}
        )
        return text

    def _probe(self, messages: Sequence[dict[str, Any]], **arguments: Any) -> str | None:
        """Return the rendered text; None if the template raises."""
        try:
            return self._apply(messages, arguments)
        except MemoryError:
            raise
        except Exception:  # a template can raise anything
            return None

    def _takes(self, name: str) -> bool:
        return self._names is None or name in self._names

    @property
    def takes_tools(self) -> bool:
        """Whether the model is shown tools, and its calls can be parsed."""
        return self._wrapper.has_chat_template and self._takes("tools") and self._markers.parse is not None

    def require_tools(self, options: ChatOptions) -> None:
        """Raise InvalidRequest if tools are offered, and the model does not take them or its calls cannot be parsed."""
        if options.offered and not self._takes("tools"):
            raise InvalidRequest("this model's chat template does not support tools; leave them out", field="tools")
        if options.offered and self._markers.parse is None:
            raise InvalidRequest(
                "macpipe cannot parse tool calls of this model, since it does not know their format; "
                "leave the tools out",
                field="tools",
            )

    def _thinking_fields(self, options: ChatOptions) -> dict[str, Any]:
        wanted = self._wanted_thinking(options)
        if wanted is None:
            return {}
        if self._can_switch(wanted):
            return {"enable_thinking": wanted}
        if options.enable_thinking is None or options.thinking_is_hint:
            return {}
        raise InvalidRequest(
            f"this model's chat template cannot switch reasoning {'on' if wanted else 'off'}", field="enable_thinking"
        )

    def _wanted_thinking(self, options: ChatOptions) -> bool | None:
        """Return whether the template should switch thinking on or off; None if it need not switch it.

        A model that never thinks need not be told so.
        """
        wanted = options.enable_thinking
        if wanted is None and options.reasoning_effort == "none":
            wanted = False
        return None if wanted is False and not self._markers.think_start else wanted

    def _can_switch(self, wanted: bool | None) -> bool:
        """Return whether thinking can be as ``wanted``: by default, or because the template can switch it."""
        return wanted is None or self._takes("enable_thinking") or self._takes("thinking")

    def _effort(self, options: ChatOptions) -> dict[str, Any]:
        effort = options.reasoning_effort
        return {"reasoning_effort": effort} if effort and self._knows_effort(effort) else {}

    def _knows_effort(self, effort: str) -> bool:
        """Return whether the template uses the effort, and does not raise for this one."""
        if not self._takes("reasoning_effort"):
            return False
        hello = ({"role": "user", "content": "Hello"},)
        return self._probe(hello, reasoning_effort=effort) is not None or self._probe(hello) is None

    def _further(self, options: ChatOptions) -> dict[str, Any]:
        if not options.template:
            return {}
        try:
            given = json.loads(options.template)
        except ValueError as error:
            raise InvalidRequest(f"chat_template_kwargs is not JSON: {error}", field="chat_template_kwargs") from error
        if not isinstance(given, dict):
            raise InvalidRequest("chat_template_kwargs must be a JSON object", field="chat_template_kwargs")
        for name in given:
            if name in OURS or not self._takes(name):
                why = "cannot be set here" if name in OURS else "is not used by the model's chat template"
                raise InvalidRequest(f"chat_template_kwargs: {name[:64]!r} {why}", field="chat_template_kwargs")
        return given


def describe_tool(tool: Tool) -> dict[str, Any]:
    """Return a tool as templates and mlx-lm's parsers read it. Raises InvalidRequest for invalid parameters."""
    try:
        parameters = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    except ValueError as error:
        raise InvalidRequest(f"the parameters of tool {tool.name!r} are not JSON: {error}", field="tools") from error
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"the parameters of tool {tool.name!r} must be a JSON object", field="tools")
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _names(wrapper: TokenizerWrapper) -> frozenset[str] | None:
    """Return every name in the template's text; None if the template is Python code of mlx-lm or the tokenizer."""
    template = wrapper.chat_template
    texts = template.values() if isinstance(template, dict) else (template,)
    if wrapper._chat_template is not None or not all(isinstance(text, str) for text in texts):
        return None
    return frozenset(name for text in texts for name in re.findall(r"[A-Za-z_]\w*", str(text)))
