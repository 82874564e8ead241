"""Text to token ids and back: the checkpoint's own tokenizer and chat template, through mlx-lm's wrapper.

It never runs code that comes with a model. It knows nothing of models' weights, requests or streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config
from mlx_lm.utils import load_tokenizer as load_wrapper

from cluster.errors import BadCheckpoint, InvalidRequest
from cluster.types import ChatMessage

__all__ = ["TextDecoder", "Tokenizer", "load_tokenizer"]

VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
"""Files one of which every tokenizer has."""
REPLACEMENT: Final = "\ufffd"


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in ``path``. Raises BadCheckpoint when there is none that can be used."""
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise BadCheckpoint(f"{str(path)!r} has no tokenizer: none of {', '.join(VOCABULARIES)} is there")
    try:
        eos = _eos_ids(load_config(path))
        extra = {"trust_remote_code": False, "local_files_only": True}
        wrapper = load_wrapper(path, extra, eos_token_ids=eos)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises whatever a damaged or unknown tokenizer makes it raise
        raise _unusable(path, error) from error
    return Tokenizer(wrapper)


def _unusable(path: Path, error: Exception) -> BadCheckpoint:
    if "contains custom code" in str(error):
        return BadCheckpoint(
            f"the tokenizer in {str(path)!r} wants its own Python code to be run; macpipe never runs code that comes "
            "with a model; use a conversion with a tokenizer.json"
        )
    return BadCheckpoint(f"the tokenizer in {str(path)!r} cannot be used: {type(error).__name__}: {str(error)[:2000]}")


def _eos_ids(config: dict[str, Any]) -> list[int] | None:
    """The ids that end an answer: generation_config.json's, else the config's; mlx-lm adds the tokenizer's own."""
    ids = config.get("eos_token_id")
    if ids is None:
        ids = (config.get("text_config") or {}).get("eos_token_id")
    return [ids] if isinstance(ids, int) else ids


class Tokenizer:
    """``eos`` are the ids that end an answer; ``vocab_size`` is the number of ids that the tokenizer knows (a model
    may have more logits than that).
    """

    def __init__(self, wrapper: TokenizerWrapper) -> None:
        self._wrapper = wrapper
        self.eos: frozenset[int] = frozenset(wrapper.eos_token_ids)
        self.vocab_size: int = len(wrapper)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``, with what the tokenizer puts around a text (a BOS) unless told not to."""
        return tuple(self._wrapper.encode(text, add_special_tokens=add_special_tokens))

    def chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of the messages in the model's own template, up to where the answer begins.

        Raises InvalidRequest for a model without a template, and for messages that the template refuses.
        """
        if not self._wrapper.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template; send it raw text instead (completions, or generate --raw)",
                field="messages",
            )
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return tuple(self._templated(plain))
        except Exception as error:  # a template is a program of the model's: it can raise anything
            raise InvalidRequest(f"the model's chat template refused them: {error}", field="messages") from error

    def _templated(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self._wrapper.apply_chat_template(messages, add_generation_prompt=True)  # type: ignore[no-untyped-call]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, special tokens as they are written."""
        text: str = self._wrapper.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def token_text(self, token: int) -> str:
        """One token's text by itself; a part of a character shows as U+FFFD."""
        return self.decode([token])

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
