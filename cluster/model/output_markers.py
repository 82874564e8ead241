"""The markers of reasoning and tool calls in a model's text.

mlx-lm derives them from the tokenizer. ``call_formats`` adds formats that mlx-lm does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from cluster.model.call_formats import CallFormat, find_call_format

__all__ = ["OutputMarkers"]


class OutputMarkers:
    """Holds the markers of one model. A marker that the model does not use is empty.

    ``call_end`` is also empty if the end of the answer ends a call. ``parse`` is the parser of mlx-lm or of
    ``call_formats``: it takes the text of a call, without its markers, and the tools as the template reads them.
    ``format`` is its name of the call format, "" if there is none.
    """

    def __init__(self, wrapper: TokenizerWrapper) -> None:
        self._wrapper = wrapper
        self.content_start: tuple[int, ...] = ()
        """Tokens that start the answer's content, after any reasoning; empty if the model does not mark it."""
        self.think_start: str = wrapper.think_start or ""
        self.think_end: str = wrapper.think_end or ""
        self.reasoning_end: tuple[int, ...] = tuple(wrapper.think_end_tokens or ())
        self.call_start: str = wrapper.tool_call_start or ""
        self.call_end: str = wrapper.tool_call_end or ""
        self.parse: Callable[[str, Any], Any] | None = wrapper.tool_parser
        self.format: str = (wrapper.init_kwargs.get("tool_parser_type") or "") if self.parse else ""
        self.noise: tuple[str, ...] = tuple(wrapper.structural_markers)
        """Markers without content; they are removed from the text."""
        if self.parse is None and (known := find_call_format(str(wrapper.chat_template or ""))):
            self._use(known)

    def _use(self, known: CallFormat) -> None:
        self.call_start, self.call_end = known.start, known.end
        self.parse, self.format = known.parse, known.name
        self.noise += known.noise
        if known.content:
            self.content_start = tuple(self._wrapper.encode(known.content, add_special_tokens=False))
        if known.think[0] and not self.think_start:
            self.think_start, self.think_end = known.think
            self.reasoning_end = tuple(self._wrapper.encode(self.think_end, add_special_tokens=False))

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Return whether ``prompt`` ends inside the reasoning: its last marker opens it, and only blanks follow."""
        if not self._wrapper.think_start:
            return False
        ids = list(prompt)
        start = self._wrapper.rfind_think_start(ids)  # type: ignore[no-untyped-call]
        end = self._wrapper.rfind_think_end(ids)  # type: ignore[no-untyped-call]
        if start <= end:
            return False
        text: str = self._wrapper.decode(ids[start + len(self._wrapper.think_start_tokens) :])
        return not text.strip()

    def to_lark(self, marker: str) -> str:
        """Return ``marker`` as a Lark expression: added tokens by their ids, everything else as text."""
        tokens = self._wrapper.encode(marker, add_special_tokens=False)
        return " ".join(self._token(token) for token in tokens)

    def _token(self, token: int) -> str:
        if token in self._wrapper.added_tokens_decoder:
            return f"<[{token}]>"
        return quote_lark(self._wrapper.decode([token], skip_special_tokens=False))


def quote_lark(text: str) -> str:
    """Return ``text`` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
