"""Breaks text at words for a terminal while it arrives in pieces. Code between fences keeps its lines."""

from __future__ import annotations

from typing import Final

FENCE: Final = "```"


class WordWrapper:
    """Wraps one text for a terminal of ``width`` columns. A word, with the spaces before it, waits for its end."""

    def __init__(self, width: int) -> None:
        self._width = max(width, 1)
        self._column = 0
        self._word = ""
        self._spaces = ""
        """Spaces before the word; left out where the line breaks."""
        self._line_start = True
        self._in_code = False

    def add(self, text: str) -> str:
        """Return what can be written now."""
        return "".join(self._add(character) for character in text)

    def break_line(self) -> str:
        """Return the end of the line if it has begun, so that something else can be written. The text goes on below."""
        begun, self._column, self._spaces = self._column > 0, 0, ""
        return "\n" if begun else ""

    def flush(self) -> str:
        """Return the text held back so far. Call it once, after the last piece."""
        rest, self._spaces = self._end_word() + self._spaces, ""
        return rest

    def _add(self, character: str) -> str:
        if not character.isspace():
            self._word += character
            return self._end_word() if self._in_code and not self._may_be_fence() else ""
        shown = self._end_word()
        if character != "\n":
            self._spaces += character
            return shown
        self._column, self._line_start, spaces, self._spaces = 0, True, self._spaces, ""
        return f"{shown}{spaces}\n"

    def _may_be_fence(self) -> bool:
        return self._line_start and (FENCE.startswith(self._word) or self._word.startswith(FENCE))

    def _end_word(self) -> str:
        from rich.cells import cell_len

        word, self._word = self._word, ""
        if not word:
            return ""
        if self._line_start and word.startswith(FENCE):
            self._in_code = not self._in_code
        self._line_start = False
        spaces, self._spaces = self._spaces, ""
        length = cell_len(spaces) + cell_len(word)
        if not self._in_code and self._column > 0 and self._column + length > self._width:
            self._column = cell_len(word)
            return f"\n{word}"
        self._column += length
        return spaces + word
