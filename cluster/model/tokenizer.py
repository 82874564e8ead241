"""Text to token ids and back: the checkpoint's own tokenizer and chat template, through mlx-lm's wrapper.

It never runs code that comes with a model. It knows nothing of models' weights, requests or streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Final

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config
from mlx_lm.utils import load_tokenizer as load_wrapper

from cluster.core.errors import BadCheckpoint, InvalidRequest, MacpipeError
from cluster.core.request import ChatMessage, ChatOptions, Grammar, Parsing
from cluster.model.answer_parser import AnswerParser
from cluster.model.chat_template import ChatTemplate
from cluster.model.grammars import Grammars
from cluster.model.output_markers import OutputMarkers
from cluster.model.panics import panics_raised_as
from cluster.model.tokenizer_bounds import require_bounded
from cluster.model.tool_call_grammar import tool_call_grammar

__all__ = ["TextDecoder", "Tokenizer", "load_tokenizer"]

VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
"""Files one of which every tokenizer has."""
PROBE: Final = "Hello"
PLAIN: Final = ChatOptions()
REPLACEMENT: Final = "\ufffd"


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in ``path``. Raises BadCheckpoint when there is none that can be used.

    What a hostile tokenizer costs is bounded only as far as ``require_bounded`` does: load one that nobody has loaded
    before in a process that can be killed (``cluster.sandbox``).
    """
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise BadCheckpoint(f"{str(path)!r} has no tokenizer: none of {', '.join(VOCABULARIES)} is there")
    require_bounded(path)
    try:
        with panics_raised_as(ValueError("the tokenizers library failed")):
            eos = _eos_ids(load_config(path))
            extra = {"trust_remote_code": False, "local_files_only": True}
            wrapper = load_wrapper(path, extra, eos_token_ids=eos)  # type: ignore[no-untyped-call]
            tokenizer = Tokenizer(wrapper)
            tokenizer.decode(tokenizer.encode(PROBE))  # some settings that make no sense are looked at only now
            return tokenizer
    except Exception as error:  # transformers raises whatever a damaged or unknown tokenizer makes it raise
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> BadCheckpoint:
    if _has_own_code(path):
        return BadCheckpoint(
            f"the tokenizer in {str(path)!r} wants its own Python code to be run; macpipe never runs code that comes "
            "with a model; use a conversion with a tokenizer.json"
        )
    return BadCheckpoint(f"the tokenizer in {str(path)!r} cannot be used: {type(error).__name__}: {str(error)[:2000]}")


def _has_own_code(path: Path) -> bool:
    """Whether the folder names a Python class of its own as its tokenizer."""
    try:
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in config.get("auto_map", ())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _eos_ids(config: dict[str, Any]) -> list[int] | None:
    """The ids that end an answer: generation_config.json's, else the config's; mlx-lm adds the tokenizer's own."""
    ids = config.get("eos_token_id")
    if ids is None:
        ids = (config.get("text_config") or {}).get("eos_token_id")
    found = [ids] if isinstance(ids, int) else ids
    if found is not None and not (isinstance(found, list) and all(type(one) is int for one in found)):
        raise ValueError("eos_token_id is neither a token id nor a list of them")
    return found


class Tokenizer:
    """``eos`` are the ids that end an answer; ``vocab_size`` is the number of ids that the tokenizer knows (a model
    may have more logits than that).
    """

    def __init__(self, wrapper: TokenizerWrapper) -> None:
        self._wrapper = wrapper
        self.eos: frozenset[int] = frozenset(wrapper.eos_token_ids)
        self.vocab_size: int = len(wrapper)
        self._marks = OutputMarkers(wrapper)
        self._template = ChatTemplate(wrapper, self._marks)
        self._grammars: Grammars | None = None
        self._lock = Lock()

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``, with what the tokenizer puts around a text (a BOS) unless told not to.

        Raises InvalidRequest for a text at which the tokenizer fails.
        """
        with panics_raised_as(InvalidRequest("the model's tokenizer fails at this text", field="prompt")):
            return tuple(self._wrapper.encode(text, add_special_tokens=add_special_tokens))

    def chat(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN) -> tuple[int, ...]:
        """Token ids of the messages in the model's own template, up to where the answer begins.

        Raises InvalidRequest for a model without a template, for messages that the template refuses, and naming the
        option that it does not know (``tools``, ``enable_thinking``, ``reasoning_effort``, ``chat_template_kwargs``).
        """
        return self._template.render(messages, options)

    def parsing(self, prompt: Sequence[int], options: ChatOptions = PLAIN) -> Parsing:
        """What an answer to ``prompt``, which ``chat`` made with the same options, is to be parsed for."""
        return Parsing(options.offered, self._marks.opens_reasoning(prompt))

    @property
    def reasoning_end(self) -> tuple[int, ...]:
        """The token ids with which the model ends its reasoning; empty for one that marks none."""
        return self._marks.reasoning_end

    def calling(self, options: ChatOptions) -> Grammar | None:
        """The grammar of an answer that must call a tool, in the model's own format; None where it need not.

        Raises InvalidRequest where the tool is none of those given, or the model's format is not one that we can write.
        """
        return tool_call_grammar(options, self._marks)

    def bound(self, grammar: Grammar, parsing: Parsing) -> Grammar:
        """``grammar`` for an answer that begins inside the reasoning: it binds what comes after that."""
        return replace(grammar, free_until=self._marks.reasoning_end) if parsing.thinking else grammar

    def parser(self, parsing: Parsing) -> AnswerParser:
        """A parser for one answer's text; see there."""
        return AnswerParser(self._marks, parsing)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile ``grammar`` and compute its first mask. Unbounded in time and memory. Raises InvalidGrammar."""
        self.grammars().check(grammar)

    def grammars(self) -> Grammars:
        """The compiler for this vocabulary, made at the first call (about 1 s). Raises InvalidGrammar: none can be."""
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._wrapper, self.eos)
            return self._grammars

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, special tokens as they are written. Raises MacpipeError where the tokenizer fails."""
        with panics_raised_as(MacpipeError("the model's tokenizer fails at the text of its tokens")):
            text: str = self._wrapper.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text

    def token_text(self, token: int) -> str:
        """One token's text by itself; a part of a character shows as U+FFFD."""
        return self.decode([token])

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """The same of many, each kind of token decoded once: a text has few kinds of them."""
        texts = {token: self.token_text(token) for token in set(tokens)}
        return [texts[token] for token in tokens]

    def decoder(self) -> TextDecoder:
        """A decoder for one answer."""
        return TextDecoder(self.decode)


class TextDecoder:
    """Turns one answer's tokens into text as they come, whole characters only.

    What ``add`` and ``flush`` return makes up exactly ``decode`` of all tokens, for byte-level tokenizers whatever
    the tokens are. (Byte-fallback tokenizers decode a run of bytes as a whole; there a run that turns out not to be
    UTF-8 after some of its characters were given out keeps those characters.)

    Tokens are decoded with those of the previous piece before them, since the first token of a text may decode
    differently, and only what that adds is given out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0
        """Tokens of the window that were given out."""
        self._given_text = ""

    def add(self, token: int) -> str:
        """-> the text that became whole with ``token``; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._given_text) :]
        del self._window[: self._given]
        self._given = len(self._window)
        self._given_text = self._decode(self._window)
        return piece

    def flush(self) -> str:
        """-> what was still held back: bytes that never became a character, as U+FFFD. The decoder starts anew."""
        piece = self._decode(self._window)[len(self._given_text) :] if self._window else ""
        self._window, self._given, self._given_text = [], 0, ""
        return piece
