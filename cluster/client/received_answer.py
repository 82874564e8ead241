"""What a client has of an answer, so that another coordinator can continue it. Both clients share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from cluster.core.errors import AnswerDiffers
from cluster.core.known_tokens import TokenDigest
from cluster.v1 import inference_pb2

Reply: TypeAlias = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class ReceivedAnswer:
    """The events of the answer to the request ``request_id`` that have arrived, from whichever coordinator.

    ``offset`` is the number of tokens that the caller had before, of each sample or of all. They are not known here.
    """

    def __init__(self, request_id: str, offset: int | Sequence[int] = 0) -> None:
        self._request_id = request_id
        self._accepted: inference_pb2.PromptInfo | None = None
        self._resumes = False
        """Whether the answer begins anew with a prompt event that is known."""
        self._offsets = list(offset) if isinstance(offset, Sequence) else [offset]
        self._counts = list(self._offsets) if any(self._offsets) else []
        self._digests: list[TokenDigest] = []
        self._finished: set[int] = set()
        self._prompt_tokens = 0

    @property
    def accepted(self) -> bool:
        """Whether a coordinator has accepted the request."""
        return self._accepted is not None

    def resume_request(self) -> inference_pb2.ResumeRequest:
        """Return the request for the rest of the answer, which is taken next."""
        self._resumes = True
        return inference_pb2.ResumeRequest(
            request_id=self._request_id,
            offsets=self._counts,
            digests=[b"" if n else one.digest() for n, one in zip(self._offsets, self._digests, strict=False)],
        )

    def take(self, reply: Reply) -> Reply | None:
        """Note an event. Return what of it is new; None if nothing is. Raise AnswerDiffers for another answer."""
        match reply.WhichOneof("event"):
            case "prompt":
                return self._accept(reply)
            case "prompt_logprobs" if isinstance(reply, inference_pb2.GenerateResponse):
                return self._take_prompt_tokens(reply)
            case "token" if reply.token.sample < len(self._counts):
                self._counts[reply.token.sample] += 1
                self._digests[reply.token.sample].add(reply.token.token)
            case "finish":
                if reply.finish.sample in self._finished:
                    return None
                self._finished.add(reply.finish.sample)
        return reply

    def _accept(self, reply: Reply) -> Reply | None:
        known, info = self._accepted, reply.prompt
        if known is None:
            samples = max(info.samples, 1)
            self._accepted = info
            self._offsets *= samples if len(self._offsets) == 1 else 1
            self._counts = list(self._offsets)
            self._digests = [TokenDigest() for _ in range(samples)]
            return reply
        if (info.prompt_tokens, info.seed, info.samples) != (known.prompt_tokens, known.seed, known.samples):
            raise AnswerDiffers(f"another request with the id {self._request_id} was resumed; send the request again")
        resumes, self._resumes = self._resumes, False
        return None if resumes else reply

    def _take_prompt_tokens(self, reply: inference_pb2.GenerateResponse) -> inference_pb2.GenerateResponse | None:
        """Return the piece without the prompt's tokens that came before: a resumed answer begins with the first."""
        piece = reply.prompt_logprobs
        known = max(self._prompt_tokens - piece.start, 0)
        if known and known >= len(piece.tokens):
            return None
        self._prompt_tokens = piece.start + len(piece.tokens)
        if not known:
            return reply
        rest = inference_pb2.PromptLogprobs(start=piece.start + known, tokens=piece.tokens[known:])
        return inference_pb2.GenerateResponse(prompt_logprobs=rest)
