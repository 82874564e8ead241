"""The sandbox's work without its processes and limits, for tests that need only its answers."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.request import ChatMessage, ChatOptions, Grammar
from cluster.model.tokenizer import Tokenizer
from cluster.sandbox.child import JobRunner
from cluster.sandbox.job_messages import CheckGrammar, Converse, Encode, Job, Limits, PromptReply
from cluster.sandbox.sandboxed_tokenizer import TextService, Tokenized, tokenized

NO_LIMITS = Limits(1e6, 1 << 40, 1e6)


class InProcess(TextService):
    """Does what ``SandboxedTokenizer`` does, on the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._worker = JobRunner(tokenizer)

    async def encode(self, text: str, max_tokens: int, *, texts: bool = False) -> Tokenized:
        return self._done(Encode(max_tokens, texts, NO_LIMITS, text))

    async def converse(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        grammar: Grammar | None,
        max_tokens: int,
        *,
        texts: bool = False,
    ) -> Tokenized:
        return self._done(Converse(max_tokens, texts, NO_LIMITS, tuple(messages), options, grammar))

    async def check_grammar(self, grammar: Grammar) -> None:
        self._worker.do(CheckGrammar(grammar, NO_LIMITS))

    async def close(self) -> None:
        """There is nothing to end."""

    def _done(self, job: Job) -> Tokenized:
        reply = self._worker.do(job)
        assert isinstance(reply, PromptReply)
        return tokenized(reply)
