"""Assembles an answer from its events and checks their order.

A missing, repeated or reordered token is an error, and so is a stream that ends without a finish event. It does no I/O,
so both clients share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.client.proto_decoding import decode_accepted, decode_finish, decode_prompt_tokens
from cluster.client.results import AcceptedRequest, Choice, Completion, Finish, PromptToken, Token
from cluster.codec.answer import decode_token
from cluster.core.errors import MacpipeError, VersionMismatch
from cluster.core.request import ToolCall, ToolCallDelta
from cluster.v1 import inference_pb2

Reply = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class _Answer:
    """The received part of one sample."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self.tokens: list[Token] = []
        self.finish: Finish | None = None

    @property
    def events(self) -> list[Token | Finish]:
        return [*self.tokens, *([self.finish] if self.finish else [])]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    def append(self, token: Token) -> None:
        expected = self._offset + len(self.tokens)
        if token.index != expected or self.finish:
            raise _protocol_error(f"got token {token.index}, expected {'no more tokens' if self.finish else expected}")
        self.tokens.append(token)

    def choice(self, finish: Finish) -> Choice:
        return Choice(
            text=self.text,
            reasoning="".join(event.reasoning for event in self.events),
            tool_calls=_join_calls([delta for event in self.events for delta in event.calls]),
            tokens=tuple(token.token for token in self.tokens),
            events=tuple(self.tokens),
            finish_reason=finish.reason,
            usage=finish.usage,
        )


def _join_calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Join deltas into tool calls, in the order of their indices."""
    calls: dict[int, ToolCall] = {}
    for piece in deltas:
        known = calls.get(piece.index, ToolCall("", "", ""))
        arguments = known.arguments + piece.arguments
        calls[piece.index] = ToolCall(known.id or piece.id, known.name or piece.name, arguments)
    return tuple(calls[index] for index in sorted(calls))


class Transcript:
    """The received part of an answer. ``prompt`` is None until acceptance, ``finish`` until all samples are complete.

    With several samples, ``text`` and ``finish`` are those of the first one.
    """

    def __init__(self, offset: int | Sequence[int] = 0) -> None:
        self.accepted: AcceptedRequest | None = None
        self._offset = offset
        self._answers = [_Answer(self._offset_of(0))]
        self._prompt_tokens: list[PromptToken] = []

    @property
    def finish(self) -> Finish | None:
        """How the first sample ended; None until all samples have ended."""
        return self._answers[0].finish if self.complete else None

    @property
    def complete(self) -> bool:
        return all(answer.finish for answer in self._answers)

    @property
    def tokens(self) -> list[Token]:
        return self._answers[0].tokens

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return self._answers[0].text

    def add_event(self, reply: Reply) -> tuple[Token, ...]:
        """Add one event. Return its tokens: zero or one. Raise MacpipeError for an event out of order."""
        event = reply.WhichOneof("event")
        opening = self.accepted is None
        if self.complete or (event == "prompt") is not opening:
            raise _protocol_error(f"{event or 'unknown event'} out of order")
        match event:
            case "prompt":
                self.accepted = decode_accepted(reply.prompt)
                self._answers = [_Answer(self._offset_of(i)) for i in range(self.accepted.samples)]
            case "prompt_logprobs" if isinstance(reply, inference_pb2.GenerateResponse):
                self._add_prompt_tokens(reply.prompt_logprobs)
            case "token":
                token = decode_token(reply.token)
                self._answer(token.sample).append(token)
                return (token,)
            case "finish":
                self._end(decode_finish(reply.finish))
            case _:
                raise VersionMismatch("unknown event from the coordinator; update this client")
        return ()

    def _add_prompt_tokens(self, piece: inference_pb2.PromptLogprobs) -> None:
        if piece.start != len(self._prompt_tokens):
            raise _protocol_error(f"got prompt token {piece.start}, expected {len(self._prompt_tokens)}")
        self._prompt_tokens += decode_prompt_tokens(piece)

    def _offset_of(self, sample: int) -> int:
        if isinstance(self._offset, Sequence):
            return self._offset[min(sample, len(self._offset) - 1)]
        return self._offset

    def _answer(self, sample: int) -> _Answer:
        if sample >= len(self._answers):
            raise _protocol_error(f"got sample {sample}, expected fewer than {len(self._answers)}")
        return self._answers[sample]

    def _end(self, finish: Finish) -> None:
        answer = self._answer(finish.sample)
        if answer.finish:
            raise _protocol_error("finish out of order")
        count = len(self._prompt_tokens)
        if self.accepted and count not in (0, self.accepted.prompt_tokens) and finish.sample == 0:
            raise _protocol_error(f"got {count} prompt tokens, expected {self.accepted.prompt_tokens}")
        answer.finish = finish

    def close(self) -> None:
        """Check the end of the stream. Raise MacpipeError if the answer is incomplete."""
        if not self.complete:
            raise self._incomplete_error()

    def completion(self) -> Completion:
        """Return the complete answer. Raise MacpipeError while it is incomplete."""
        accepted, finish = self.accepted, self.finish
        if accepted is None or finish is None:
            raise self._incomplete_error()
        choices = tuple(answer.choice(answer.finish) for answer in self._answers if answer.finish)
        first = choices[0]
        return Completion(
            text=first.text,
            tokens=first.tokens,
            events=first.events,
            finish_reason=first.finish_reason,
            usage=first.usage,
            timings=finish.timings,
            stages=finish.stages,
            seed=accepted.seed,
            request_id=accepted.request_id,
            model=accepted.model,
            reasoning=first.reasoning,
            tool_calls=first.tool_calls,
            choices=choices,
            prompt_logprobs=tuple(self._prompt_tokens),
        )

    def _incomplete_error(self) -> MacpipeError:
        count = sum(len(answer.tokens) for answer in self._answers)
        return MacpipeError(f"the answer ended after {count} tokens without a finish event")


def _protocol_error(what: str) -> MacpipeError:
    return MacpipeError(f"protocol error from the coordinator: {what}")


class PartialAnswer:
    """Properties of a partial answer, shared by both clients' streams."""

    def __init__(self, offset: int | Sequence[int] = 0) -> None:
        self._transcript = Transcript(offset)

    @property
    def accepted(self) -> AcceptedRequest | None:
        """The request's acceptance; None until it arrives (see ``wait_accepted``)."""
        return self._transcript.accepted

    @property
    def text(self) -> str:
        """The answer's text so far; complete once ``finish`` is set."""
        return self._transcript.text

    @property
    def finish(self) -> Finish | None:
        """How the answer ended; None while it is in progress."""
        return self._transcript.finish
