"""Several answers of one prompt: edits that start them from a copy of it, and how many grammars a frame may carry."""

from __future__ import annotations

from collections.abc import Sequence as Several

from cluster.frames import Drop, Edit, Join, Restore, Save
from cluster.limits import MAX_JOINED_BYTES
from cluster.scheduler.sequence import Sequence


def copies(leader: Sequence, followers: Several[Sequence], prefix: int) -> list[Edit]:
    """Let ``followers`` join with what the stages hold of ``leader``: all of its prompt but the last token.

    The copy is whole, so caches that cannot be trimmed can be copied too; and it is dropped in the same frame.
    """
    edits: list[Edit] = [Save(leader.id, prefix)]
    for sequence in followers:
        request, sequence.joined = sequence.request, True
        edits += [Join(sequence.id, len(request.prompt), request.sampling), Restore(sequence.id, prefix)]
        sequence.fed.extend(leader.fed)
        sequence.cached = sequence.prefilled = len(sequence.fed)
        sequence.next_token = request.prompt[-1]
    return [*edits, Drop(prefix)]


def first_load(edits: Several[Edit]) -> int:
    """How many of ``edits`` a frame of its own has to take away, so that the rest may fit one; 0 where all do."""
    loads = [
        len(e.sampling.grammar.source.encode()) if isinstance(e, Join) and e.sampling.grammar else 0 for e in edits
    ]
    if sum(loads) <= MAX_JOINED_BYTES:
        return 0
    total = 0
    for i, load in enumerate(loads):
        total += load
        if total > MAX_JOINED_BYTES:
            return max(i, 1)
    return 0
