"""How a model marks its reasoning and its calls of tools in its text, as mlx-lm knows it of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = ["OutputMarkers"]


class OutputMarkers:
    """``parse`` is mlx-lm's parser: the text of a call, without its marks, and the tools as the template reads them.

    Empty marks are those that a model does not use; ``call_end`` is empty too where the end of the answer ends a call.
    ``format`` is mlx-lm's name for how calls are written, "" where it has none.
    """

    def __init__(self, wrapper: TokenizerWrapper) -> None:
        self._wrapper = wrapper
        self.think_start: str = wrapper.think_start or ""
        self.think_end: str = wrapper.think_end or ""
        self.reasoning_end: tuple[int, ...] = tuple(wrapper.think_end_tokens or ())
        self.call_start: str = wrapper.tool_call_start or ""
        self.call_end: str = wrapper.tool_call_end or ""
        self.parse: Callable[[str, Any], Any] | None = wrapper.tool_parser
        self.format: str = (wrapper.init_kwargs.get("tool_parser_type") or "") if self.parse else ""
        self.noise: tuple[str, ...] = tuple(wrapper.structural_markers)
        """Marks that say nothing: they are left out of the text."""

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` ends inside the reasoning: its last mark opens it, and nothing was said since."""
        if not self.think_start:
            return False
        ids = list(prompt)
        start, end = self._wrapper.rfind_think_start(ids), self._wrapper.rfind_think_end(ids)  # type: ignore[no-untyped-call]
        if start <= end:
            return False
        said: str = self._wrapper.decode(ids[start + len(self._wrapper.think_start_tokens) :])
        return not said.strip()

    def spelled(self, mark: str) -> str:
        """``mark`` as it stands in a Lark grammar: added tokens by their ids, everything else as text."""
        tokens = self._wrapper.encode(mark, add_special_tokens=False)
        return " ".join(self._token(token) for token in tokens)

    def _token(self, token: int) -> str:
        if token in self._wrapper.added_tokens_decoder:
            return f"<[{token}]>"
        return quote_lark(self._wrapper.decode([token], skip_special_tokens=False))


def quote_lark(text: str) -> str:
    """``text`` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
