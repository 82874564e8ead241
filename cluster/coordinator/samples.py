"""Several answers of one prompt: the requests that they are to the scheduler, and who is told of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from cluster.coordinator.answer import Answer
from cluster.types import Request


def requests_of(request: Request) -> tuple[Request, ...]:
    """One request a sample, ``ID``, ``ID#1`` and so on. Sample 0 is what one alone would be."""
    return (request, *(_sample(request, i) for i in range(1, request.samples)))


def _sample(request: Request, index: int) -> Request:
    """Its seed is BLAKE2b-64 of (seed, index), both as unsigned little-endian 64-bit integers."""
    given = b"".join(n.to_bytes(8, "little") for n in (request.sampling.seed, index))
    digest = hashlib.blake2b(given, digest_size=8, person=b"macpipe.sample").digest()
    sampling = replace(request.sampling, seed=int.from_bytes(digest, "little") >> 1)
    return replace(request, id=f"{request.id}#{index}", sampling=sampling)


@dataclass(slots=True)
class Asked:
    """A client's request with the samples of it that are live, by their ids. They end together where one fails."""

    request: Request
    answer: Answer
    live: set[str] = field(default_factory=set)
