"""Refuses texts that are too long to tokenize whole, at the cost of tokenizing them piece by piece.

Tokenizing takes 100 to 340 bytes of memory for each byte of a text. Pieces need little memory, but their tokens are
not those of the whole text: a token may be cut in two. So they only tell how many tokens there are at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from cluster.core.errors import PromptTooLong
from cluster.core.limits import KIB, MAX_TOKEN_CHARS, WHOLE_PROMPT_BYTES
from cluster.core.request import utf8_size

__all__ = ["require_at_most"]

PIECE_CHARS: Final = 128 * KIB
EXTRA_TOKENS: Final = MAX_TOKEN_CHARS
"""Tokens that a cut may add: at worst, one for each character of the longest token."""


def require_at_most(most: int, text: str, encode: Callable[[str], Sequence[int]], field: str) -> None:
    """Raise ``PromptTooLong`` if ``text`` certainly has more than ``most`` tokens.

    ``encode`` tokenizes a piece without special tokens. Texts of at most ``WHOLE_PROMPT_BYTES`` are not counted.
    """
    size = utf8_size(text)
    if size <= WHOLE_PROMPT_BYTES:
        return
    least = 0
    for start in range(0, len(text), PIECE_CHARS):
        least += max(0, len(encode(text[start : start + PIECE_CHARS])) - EXTRA_TOKENS)
        if least > most:
            raise PromptTooLong(
                f"the prompt has {size} bytes and more than {most} tokens; shorten it to at most {most} tokens",
                field=field,
                tokens=str(least),
                maximum=str(most),
            )
