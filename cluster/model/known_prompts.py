"""Keeps the latest prompts of each owner, so that only what is new of the next one is tokenized.

A tokenizer first looks for its added tokens, such as ``<|im_start|>``, and tokenizes what is between two of them on its
own. So the tokens before an added token do not depend on what follows it. Where two prompts share their beginning, the
last added token in it is a border: what is before it has the tokens that it had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from mlx_lm.tokenizer_utils import TokenizerWrapper

from cluster.model.rendered_prompt import EncodedPiece, RenderedPrompt, join_pieces, tokenize
from cluster.model.split_points import shared_length

__all__ = ["KnownPrompts"]

MAX_KNOWN_TOKENS: Final = 131_072
"""Tokens of all prompts that are kept; each takes about 200 bytes."""
_LEAST_TOKENS: Final = 512
"""Fewer known tokens save less than finding them takes."""
_TOKEN_CHARS: Final = 16
_MOST_PIECES: Final = 64
"""Pieces of one prompt, each with an encoding; with more, it is tokenized whole."""
_SAME_CHARS: Final = 256
"""Characters by which a prompt is ruled out that shares less."""
_SAME_SHARE: Final = 15 / 16
"""Share of a prompt's tokens that another one must have to take its place."""
_CHECKS: Final = 3
"""Prompts that are tokenized whole, too, in case a tokenizer does not keep what is described above."""


@dataclass(frozen=True, slots=True)
class _Border:
    """A prompt, and how many of its characters and tokens are before an added token that another prompt has, too."""

    prompt: RenderedPrompt
    characters: int
    tokens: int


class KnownPrompts:
    """The latest prompts in one tokenizer: at most ``most_tokens`` of all owners. Not thread-safe."""

    def __init__(self, wrapper: TokenizerWrapper, most_tokens: int = MAX_KNOWN_TOKENS) -> None:
        self._wrapper, self._most = wrapper, most_tokens
        self._prompts: OrderedDict[tuple[str, str], RenderedPrompt] = OrderedDict()
        """By owner and text, the least recently used first."""
        self._tokens = 0
        self._unchecked = _CHECKS
        self._borders, self._longest = _find_added_tokens(wrapper)
        """The added tokens that are borders, by id, and the length of the longest of all."""

    def __len__(self) -> int:
        return len(self._prompts)

    def tokenize(self, text: str, owner: str) -> RenderedPrompt:
        """Tokenize a rendered text, without adding special tokens: its tokens are those of ``tokenize``.

        Nothing of one owner shortens the work for another, which could be timed. Nothing is kept of owner "".
        """
        border = self._find_border(text, owner) if owner else None
        prompt = (border and self._extend(border, text)) or tokenize(self._wrapper, text)
        if owner and prompt.pieces and self._borders and len(prompt.ids) >= _LEAST_TOKENS:
            if border and border.tokens >= len(border.prompt.ids) * _SAME_SHARE:
                self._drop((owner, border.prompt.text))  # the next turn of the same conversation takes its place
            elif border:
                self._prompts.move_to_end((owner, border.prompt.text))
            self._keep((owner, text), prompt)
        return prompt

    def _find_border(self, text: str, owner: str) -> _Border | None:
        """Return the last border that the text shares with a prompt of the owner; None if there is none of use."""
        start = text[:_SAME_CHARS]
        own = [p for (name, _), p in self._prompts.items() if name == owner and p.text.startswith(start)]
        found = [border for border in (self._last_border(p, shared_length(p.text, text)) for p in own) if border]
        border = max(found, key=lambda one: one.tokens, default=None)
        useful = border and border.tokens >= _LEAST_TOKENS and len(border.prompt.pieces) < _MOST_PIECES
        return border if useful else None

    def _last_border(self, prompt: RenderedPrompt, shared: int) -> _Border | None:
        """Return the last border in the first ``shared`` characters of a prompt.

        Behind it there must be room for the longest added token, so that the same one is found in both texts.
        """
        last = shared - self._longest
        at = min(prompt.tokens_before(last), len(prompt.ids) - 1) if last > 0 else 0
        while at > 0:
            written = self._borders.get(prompt.ids[at])
            if written is not None:
                characters = _start_of(prompt.pieces, at)
                if 0 < characters <= last and prompt.text.startswith(written, characters):
                    return _Border(prompt, characters, at)
            at -= 1
        return None

    def _extend(self, border: _Border, text: str) -> RenderedPrompt | None:
        """Return the prompt ``text``, which has what is before the border; None if it must be tokenized whole."""
        rest = tokenize(self._wrapper, text[border.characters :])
        if not rest.ids or rest.ids[0] != border.prompt.ids[border.tokens]:
            return None
        ids = border.prompt.ids[: border.tokens] + rest.ids
        before = tuple(piece for piece in border.prompt.pieces if piece.characters < border.characters)
        pieces = (*before, EncodedPiece(border.characters, border.tokens, rest.pieces[0].encoding))
        if self._unchecked:
            self._unchecked -= 1
            if tokenize(self._wrapper, text).ids != ids:
                self._borders = {}
                return None
        return join_pieces(text, ids, pieces)

    def _keep(self, key: tuple[str, str], prompt: RenderedPrompt) -> None:
        self._drop(key)
        self._prompts[key] = prompt
        self._tokens += _size(prompt)
        while self._tokens > self._most:
            self._drop(next(iter(self._prompts)))

    def _drop(self, key: tuple[str, str]) -> None:
        dropped = self._prompts.pop(key, None)
        self._tokens -= _size(dropped) if dropped else 0


def _size(prompt: RenderedPrompt) -> int:
    """Return the tokens for which a prompt counts: a text of few, long tokens takes memory, too."""
    return max(len(prompt.ids), len(prompt.text) // _TOKEN_CHARS)


def _start_of(pieces: Iterable[EncodedPiece], token: int) -> int:
    """Return the position in the text at which a token begins; -1 if it has none."""
    piece = max((p for p in pieces if p.tokens <= token), key=lambda p: p.tokens)
    span: tuple[int, int] | None = piece.encoding.token_to_chars(token - piece.tokens)
    return -1 if span is None else piece.characters + span[0]


def _find_added_tokens(wrapper: Any) -> tuple[dict[int, str], int]:
    """Return the added tokens that are borders, by id, and the length of the longest added token.

    Those are no borders that take spaces beside them, that depend on the letters beside them, or that are looked for
    in the normalized text.
    """
    added = getattr(wrapper, "added_tokens_decoder", {}) if getattr(wrapper, "is_fast", False) else {}
    borders = {
        token: one.content
        for token, one in added.items()
        if one.content and not (one.normalized or one.lstrip or one.rstrip or one.single_word)
    }
    return borders, max((len(one.content) for one in added.values()), default=0)
