"""An answer as it comes in: events in their order, and whether it is whole.

It knows what order the contract promises and holds the coordinator to it: a missing, repeated or reordered token is an
error, as is an end that was not announced. It waits for nothing, so both clients share it.
"""

from __future__ import annotations

from cluster.client import replies
from cluster.client.answers import Completion, Finish, Prompt, Token
from cluster.errors import MacpipeError, VersionMismatch
from cluster.v1 import inference_pb2

Reply = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class Transcript:
    """What has come of one answer. ``prompt`` is None until it was accepted, ``finish`` until it is complete."""

    def __init__(self) -> None:
        self.prompt: Prompt | None = None
        self.finish: Finish | None = None
        self.tokens: list[Token] = []

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(token.text for token in self.tokens) + (self.finish.text if self.finish else "")

    def accept(self, reply: Reply) -> tuple[Token, ...]:
        """Take in one event; returns the tokens it brought, none or one. Raises MacpipeError for one out of order."""
        event = reply.WhichOneof("event")
        opening = self.prompt is None
        if self.finish is not None or (event == "prompt") is not opening:
            raise MacpipeError(f"the coordinator sent a broken answer: {event or 'an unknown event'} out of order")
        match event:
            case "prompt":
                self.prompt = replies.prompt(reply.prompt)
            case "token":
                return (self._append(replies.token(reply.token)),)
            case "finish":
                self.finish = replies.finish(reply.finish)
            case _:
                raise VersionMismatch("the coordinator sent an event that is unknown to this version")
        return ()

    def close(self) -> None:
        """The stream has ended. Raises MacpipeError if the answer has not."""
        if self.finish is None:
            raise self._cut_short()

    def completion(self) -> Completion:
        """The whole answer; raises MacpipeError while it is not whole."""
        prompt, finish = self.prompt, self.finish
        if prompt is None or finish is None:
            raise self._cut_short()
        return Completion(
            text=self.text,
            tokens=tuple(token.token for token in self.tokens),
            events=tuple(self.tokens),
            finish_reason=finish.reason,
            usage=finish.usage,
            timings=finish.timings,
            stages=finish.stages,
            seed=prompt.seed,
            request_id=prompt.request_id,
            model=prompt.model,
        )

    def _append(self, token: Token) -> Token:
        if token.index != len(self.tokens):
            raise MacpipeError(
                f"the coordinator sent a broken answer: token {token.index} where {len(self.tokens)} was due"
            )
        self.tokens.append(token)
        return token

    def _cut_short(self) -> MacpipeError:
        return MacpipeError(f"the coordinator ended the answer after {len(self.tokens)} tokens without saying why")


class Transcribed:
    """What both streams let be seen of their answer while it comes."""

    def __init__(self) -> None:
        self._transcript = Transcript()

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
