"""The sandbox's work without its processes and limits, for tests that need only its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.core.request import ChatMessage, ChatOptions, Grammar, Tool, ToolCall
from cluster.model.answer_parser import AnswerParser, Parsed
from cluster.model.tokenizer import Tokenizer
from cluster.sandbox.child import JobRunner
from cluster.sandbox.job_messages import CheckGrammar, Converse, Encode, Job, Limits, PromptReply
from cluster.sandbox.sandboxed_tokenizer import TextService, Tokenized, convert_reply

NO_LIMITS = Limits(1e6, 1 << 40, 1e6)


class InProcess(TextService):
    """Does what ``SandboxedTokenizer`` does, on the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._worker, self._tokenizer = JobRunner(tokenizer), tokenizer

    async def encode(self, text: str, max_tokens: int, *, texts: bool = False, special: bool = True) -> Tokenized:
        return self._done(Encode(max_tokens, texts, NO_LIMITS, text, special))

    async def converse(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        grammar: Grammar | None,
        max_tokens: int,
        *,
        texts: bool = False,
        owner: str = "",
    ) -> Tokenized:
        return self._done(Converse(max_tokens, texts, NO_LIMITS, tuple(messages), options, grammar, owner))

    async def check_grammar(self, grammar: Grammar) -> None:
        self._worker.do(CheckGrammar(grammar, NO_LIMITS))

    async def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        return self._tokenizer.read_calls(body, tools)

    async def close(self) -> None:
        """There is nothing to end."""

    def _done(self, job: Job) -> Tokenized:
        reply = self._worker.do(job)
        assert isinstance(reply, PromptReply)
        return convert_reply(reply)


def with_calls_read(
    tokenizer: Tokenizer, parser: AnswerParser, first: Parsed, tools: Sequence[Tool]
) -> Iterator[Parsed]:
    """Yield ``first``, which ``parser`` has just returned, and what follows once the calls in it are read."""
    yield first
    while (body := parser.unread_calls) is not None:
        yield parser.add_calls(tokenizer.read_calls(body, tools))
