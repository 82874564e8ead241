"""An answer as it comes in: events in their order, and whether it is whole.

It knows what order the contract promises and holds the coordinator to it: a missing, repeated or reordered token is an
error, as is an end that was not announced. It waits for nothing, so both clients share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.client import proto_decoding as replies
from cluster.client.results import Choice, Completion, Finish, Prompt, Token
from cluster.core.errors import MacpipeError, VersionMismatch
from cluster.core.request import ToolCall, ToolCallDelta
from cluster.v1 import inference_pb2

Reply = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class _Answer:
    """What has come of one sample."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self.tokens: list[Token] = []
        self.finish: Finish | None = None

    @property
    def said(self) -> list[Token | Finish]:
        return [*self.tokens, *([self.finish] if self.finish else [])]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.said)

    def append(self, token: Token) -> None:
        due = self._offset + len(self.tokens)
        if token.index != due or self.finish:
            raise MacpipeError(f"the coordinator sent a broken answer: token {token.index} where {due} was due")
        self.tokens.append(token)

    def choice(self, finish: Finish) -> Choice:
        return Choice(
            text=self.text,
            reasoning="".join(event.reasoning for event in self.said),
            tool_calls=_join_calls([delta for event in self.said for delta in event.calls]),
            tokens=tuple(token.token for token in self.tokens),
            events=tuple(self.tokens),
            finish_reason=finish.reason,
            usage=finish.usage,
        )


def _join_calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls that these pieces make up."""
    calls: dict[int, ToolCall] = {}
    for piece in deltas:
        known = calls.get(piece.index, ToolCall("", "", ""))
        arguments = known.arguments + piece.arguments
        calls[piece.index] = ToolCall(known.id or piece.id, known.name or piece.name, arguments)
    return tuple(calls[index] for index in sorted(calls))


class Transcript:
    """What has come of an answer. ``prompt`` is None until it was accepted, ``finish`` until all of it is complete.

    Where several samples were asked for, ``text`` and ``finish`` are the first one's.
    """

    def __init__(self, offset: int | Sequence[int] = 0) -> None:
        self.prompt: Prompt | None = None
        self._offset = offset
        self._answers = [_Answer(self._begins_at(0))]

    @property
    def finish(self) -> Finish | None:
        """How the first sample ended, once all have."""
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

    def accept(self, reply: Reply) -> tuple[Token, ...]:
        """Take in one event; returns the tokens it brought, none or one. Raises MacpipeError for one out of order."""
        event = reply.WhichOneof("event")
        opening = self.prompt is None
        if self.complete or (event == "prompt") is not opening:
            raise MacpipeError(f"the coordinator sent a broken answer: {event or 'an unknown event'} out of order")
        match event:
            case "prompt":
                self.prompt = replies.prompt(reply.prompt)
                self._answers = [_Answer(self._begins_at(i)) for i in range(self.prompt.samples)]
            case "token":
                token = replies.token(reply.token)
                self._answer(token.sample).append(token)
                return (token,)
            case "finish":
                self._end(replies.finish(reply.finish))
            case _:
                raise VersionMismatch("the coordinator sent an event that is unknown to this version")
        return ()

    def _begins_at(self, sample: int) -> int:
        if isinstance(self._offset, Sequence):
            return self._offset[min(sample, len(self._offset) - 1)]
        return self._offset

    def _answer(self, sample: int) -> _Answer:
        if sample >= len(self._answers):
            raise MacpipeError(f"the coordinator sent a broken answer: sample {sample} of {len(self._answers)}")
        return self._answers[sample]

    def _end(self, finish: Finish) -> None:
        answer = self._answer(finish.sample)
        if answer.finish:
            raise MacpipeError("the coordinator sent a broken answer: finish out of order")
        answer.finish = finish

    def close(self) -> None:
        """The stream has ended. Raises MacpipeError if the answer has not."""
        if not self.complete:
            raise self._cut_short()

    def completion(self) -> Completion:
        """The whole answer; raises MacpipeError while it is not whole."""
        prompt, finish = self.prompt, self.finish
        if prompt is None or finish is None:
            raise self._cut_short()
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
            seed=prompt.seed,
            request_id=prompt.request_id,
            model=prompt.model,
            reasoning=first.reasoning,
            tool_calls=first.tool_calls,
            choices=choices,
        )

    def _cut_short(self) -> MacpipeError:
        told = sum(len(answer.tokens) for answer in self._answers)
        return MacpipeError(f"the coordinator ended the answer after {told} tokens without saying why")


class Transcribed:
    """What both streams let be seen of their answer while it comes."""

    def __init__(self, offset: int | Sequence[int] = 0) -> None:
        self._transcript = Transcript(offset)

    @property
    def prompt(self) -> Prompt | None:
        """What was accepted; None until the coordinator has said so (see ``wait_accepted``)."""
        return self._transcript.prompt

    @property
    def text(self) -> str:
        """The answer's text so far; all of it once ``finish`` is there."""
        return self._transcript.text

    @property
    def finish(self) -> Finish | None:
        """How the answer ended; None until it has."""
        return self._transcript.finish
