"""Whether a grammar can be enforced, found out before its request is accepted, at a bounded cost."""

from __future__ import annotations

from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidGrammar
from cluster.core.request import Grammar


class GrammarCheck:
    """``max_bytes`` bounds a grammar's source."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    async def check(self, grammar: Grammar, checkpoint: ModelInfo) -> None:
        """Raises ``InvalidGrammar``: too long, impossible to compile (with the reason), or too much work.

        Raises ``Busy`` where too many others wait.
        """
        size = len(grammar.source.encode())
        if size > self._max_bytes:
            raise InvalidGrammar(
                f"the {grammar.kind.value} has {size} bytes; at most {self._max_bytes} are taken (--max-schema-bytes)",
                field=grammar.kind.value,
            )
        await checkpoint.text.check_grammar(grammar)
