"""Check at a bounded cost, before a request is accepted, whether its grammar can be enforced."""

from __future__ import annotations

from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidGrammar
from cluster.core.request import Grammar


class GrammarCheck:
    """Checks grammars. ``max_bytes`` is the maximum size of a grammar's source."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    async def check(self, grammar: Grammar, model_info: ModelInfo) -> None:
        """Raise ``InvalidGrammar`` if the grammar is too long, does not compile (with the reason) or is too costly.

        Raises ``Busy`` if too many checks are waiting.
        """
        size = len(grammar.source.encode())
        if size > self._max_bytes:
            raise InvalidGrammar(
                f"the {grammar.kind.value} has {size} bytes; the limit is {self._max_bytes} (--max-schema-bytes)",
                field=grammar.kind.value,
            )
        await model_info.text.check_grammar(grammar)
