"""Converts text to token ids and back, with the checkpoint's own tokenizer and chat template in mlx-lm's wrapper.

It never runs code that comes with a model. It knows nothing of weights, requests or streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config
from mlx_lm.utils import load_tokenizer as load_wrapper

from cluster.core.errors import BadCheckpoint, InvalidRequest, MacpipeError
from cluster.core.request import ChatMessage, ChatOptions, Grammar, Parsing, Tool, ToolCall
from cluster.model.answer_parser import AnswerParser, read_calls
from cluster.model.chat_template import ChatTemplate
from cluster.model.grammars import Grammars
from cluster.model.output_markers import OutputMarkers
from cluster.model.panics import panics_raised_as
from cluster.model.prompt_length import require_at_most
from cluster.model.rendered_prompt import RenderedPrompt
from cluster.model.split_points import SplitPoints
from cluster.model.tokenizer_limits import require_bounded
from cluster.model.tool_call_grammar import tool_call_grammar

__all__ = ["TextDecoder", "Tokenizer", "load_tokenizer"]

VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
"""Every tokenizer has at least one of these files."""
PROBE: Final = "Hello"
PLAIN: Final = ChatOptions()
REPLACEMENT: Final = "\ufffd"
UNDECIDED: Final = 16
"""Tokens that are held back for an incomplete character. A character has at most four bytes, and a token at least one;
runs of more are invalid in any case."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of the checkpoint in ``path``. Raises BadCheckpoint if it is missing or unusable.

    ``require_bounded`` bounds the cost of a hostile tokenizer only in part: load a tokenizer for the first time in a
    process that can be killed (``cluster.sandbox``).
    """
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise BadCheckpoint(
            f"{str(path)!r} has no tokenizer: it has none of {', '.join(VOCABULARIES)}; copy or fetch the model again"
        )
    require_bounded(path)
    try:
        with panics_raised_as(ValueError("the tokenizers library failed")):
            eos = _eos_ids(load_config(path))
            extra = {"trust_remote_code": False, "local_files_only": True}
            wrapper = load_wrapper(path, extra, eos_token_ids=eos)  # type: ignore[no-untyped-call]
            tokenizer = Tokenizer(wrapper)
            tokenizer.decode(tokenizer.encode(PROBE))  # some invalid settings fail only at the first use
            return tokenizer
    except Exception as error:  # transformers may raise anything for a damaged or unknown tokenizer
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> BadCheckpoint:
    if _has_own_code(path):
        return BadCheckpoint(
            f"the tokenizer in {str(path)!r} needs its own Python code; macpipe never runs code that comes "
            "with a model; use a conversion with a tokenizer.json"
        )
    return BadCheckpoint(f"the tokenizer in {str(path)!r} cannot be used: {type(error).__name__}: {str(error)[:2000]}")


def _has_own_code(path: Path) -> bool:
    """Return whether the folder's tokenizer is a Python class that comes with it."""
    try:
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in config.get("auto_map", ())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _eos_ids(config: dict[str, Any]) -> list[int] | None:
    """Return the ids that end an answer, from generation_config.json or else the config; mlx-lm adds the tokenizer's.

    Raises ValueError if they are not token ids.
    """
    ids = config.get("eos_token_id")
    if ids is None:
        ids = (config.get("text_config") or {}).get("eos_token_id")
    found = [ids] if isinstance(ids, int) else ids
    if found is not None and not (isinstance(found, list) and all(type(one) is int for one in found)):
        raise ValueError("eos_token_id is neither a token id nor a list of them")
    return found


class Tokenizer:
    """A model's tokenizer and chat template.

    ``eos`` are the ids that end an answer. ``vocab_size`` is the number of ids that the tokenizer knows; a model may
    have more logits than that.
    """

    def __init__(self, wrapper: TokenizerWrapper) -> None:
        self._wrapper = wrapper
        self.eos: frozenset[int] = frozenset(wrapper.eos_token_ids)
        self.vocab_size: int = len(wrapper)
        self._markers = OutputMarkers(wrapper)
        self._template = ChatTemplate(wrapper, self._markers)
        self._grammars: Grammars | None = None
        self._lock = Lock()

    @property
    def wrapper(self) -> TokenizerWrapper:
        """Return mlx-lm's own tokenizer, for mlx-lm's own code."""
        return self._wrapper

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token, special tokens included."""
        return dict(self._wrapper.get_vocab())

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> tuple[int, ...]:
        """Return the token ids of ``text``, by default with the tokenizer's special tokens around it (a BOS).

        Raises InvalidRequest if the tokenizer fails on the text, and PromptTooLong if ``most`` is given and a long text
        certainly has more tokens than that.
        """
        with panics_raised_as(InvalidRequest("the model's tokenizer fails on this text; change it", field="prompt")):
            if most is not None:
                require_at_most(most, text, partial(self._wrapper.encode, add_special_tokens=False), "prompt")
            return tuple(self._wrapper.encode(text, add_special_tokens=add_special_tokens))

    def chat(
        self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN, most: int | None = None
    ) -> tuple[int, ...]:
        """Return the token ids of the messages in the model's own template, up to the start of the answer.

        Raises InvalidRequest if the model has no template, if the template rejects the messages, or if it does not
        support an option (``tools``, ``enable_thinking``, ``chat_template_kwargs``). Hints that it does not support
        are ignored. Raises PromptTooLong as ``encode``.
        """
        return self.render(messages, options, most).ids

    def render(
        self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN, most: int | None = None, owner: str = ""
    ) -> RenderedPrompt:
        """Return the text of the messages, too. Raises as ``chat``.

        If ``owner`` is not empty, the prompt is kept, so that only what is new of the owner's next one is tokenized.
        Then it is not thread-safe.
        """
        return self._template.render(messages, options, most, owner)

    def find_split_points(
        self, messages: Sequence[ChatMessage], options: ChatOptions, prompt: RenderedPrompt
    ) -> SplitPoints:
        """Return the lengths at which later prompts may part from ``prompt``, which ``render`` returned for these.

        Raises InvalidRequest if the tokenizer fails.
        """
        return self._template.find_split_points(messages, options, prompt)

    def ignored_options(self, options: ChatOptions) -> tuple[str, ...]:
        """Return the names of the hints in ``options`` that the chat template does not support."""
        return self._template.ignored_options(options)

    def parsing(self, prompt: Sequence[int], options: ChatOptions = PLAIN) -> Parsing:
        """Return how to parse the answer to ``prompt``, which ``chat`` returned for the same options."""
        return Parsing(options.offered, self._markers.opens_reasoning(prompt))

    @property
    def takes_tools(self) -> bool:
        """Whether conversations with this model may have tools."""
        return self._template.takes_tools

    @property
    def reasoning_end(self) -> tuple[int, ...]:
        """Return the token ids that end the model's reasoning; empty if it has no reasoning markers."""
        return self._markers.reasoning_end

    def required_call_grammar(self, options: ChatOptions) -> Grammar | None:
        """Return the grammar of an answer that must call a tool, in the model's own format; None if it need not.

        Raises InvalidRequest if the tool was not offered, if the model takes no tools, or if no grammar is known for
        its call format.
        """
        self._template.require_tools(options)
        return tool_call_grammar(options, self._markers)

    def defer_past_reasoning(self, grammar: Grammar, parsing: Parsing, *, calls: bool = False) -> Grammar:
        """Return ``grammar`` for an answer with this ``parsing``: it applies after the reasoning, if there is any.

        ``calls``: the grammar is that of a tool call, not of the content.
        """
        if self._markers.content_start and not calls:
            return replace(grammar, free_until=self._markers.content_start)
        return replace(grammar, free_until=self._markers.reasoning_end) if parsing.thinking else grammar

    def parser(self, parsing: Parsing, identity: str = "") -> AnswerParser:
        """Return a parser for one answer's text. The ids of its calls follow from ``identity``; "": random ones."""
        return AnswerParser(self._markers, parsing, identity)

    def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        """Return the calls of ``tools`` in the text between two markers; none if any is invalid.

        Unbounded in time and memory.
        """
        return read_calls(body, self._markers, tools)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile ``grammar`` and follow it for some tokens. Unbounded in time and memory. Raises InvalidGrammar."""
        self.grammars().check(grammar)

    def grammars(self) -> Grammars:
        """Return the grammar compiler; the first call takes about 1 s. Raises InvalidGrammar if it is not supported."""
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._wrapper, self.eos)
            return self._grammars

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, including that of special tokens. Raises MacpipeError if the tokenizer fails."""
        with panics_raised_as(MacpipeError("the model's tokenizer cannot decode its own tokens")):
            text: str = self._wrapper.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text

    def token_text(self, token: int) -> str:
        """Return the text of a single token; an incomplete character becomes U+FFFD."""
        return self.decode([token])

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Return the text of each token. Each distinct token is decoded once, since texts repeat tokens."""
        texts = {token: self.token_text(token) for token in set(tokens)}
        return [texts[token] for token in tokens]

    def decoder(self) -> TextDecoder:
        """Return a streaming decoder for one answer."""
        return TextDecoder(self.decode)


class TextDecoder:
    """Decodes one answer's tokens incrementally, in whole characters.

    For byte-level tokenizers, the concatenated results of ``add`` and ``flush`` equal ``decode`` of all tokens.
    Byte-fallback tokenizers decode a run of bytes as a whole: if a run turns out to be invalid UTF-8 after some of its
    characters were returned, these characters stay.

    Tokens are decoded together with those of the previous piece, since the first token of a text may decode
    differently. Only the added text is returned.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0
        """Tokens of the window whose text was returned."""
        self._given_text = ""

    def add(self, token: int) -> str:
        """Return the text that ``token`` completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._certain(text) if len(self._window) > self._given + UNDECIDED else ""
        piece = text[len(self._given_text) :]
        del self._window[: self._given]
        self._given = len(self._window)
        self._given_text = self._decode(self._window)
        return piece

    def _certain(self, text: str) -> str:
        """Return the text of a long window except its last character, which alone can still change.

        Otherwise an answer of nothing but incomplete characters, which a client can force with ``logit_bias``, would be
        decoded from its beginning at each token.
        """
        piece = text[len(self._given_text) : -1]
        del self._window[:-UNDECIDED]
        self._given = 0
        self._given_text = self._decode(self._window)[:-1]
        return piece

    def flush(self) -> str:
        """Return the remaining text, with U+FFFD for incomplete characters, and reset the decoder."""
        piece = self._decode(self._window)[len(self._given_text) :] if self._window else ""
        self._window = []
        self._given = 0
        self._given_text = ""
        return piece
