"""Several answers of one prompt: edits that start them from a copy of it."""

from __future__ import annotations

from collections.abc import Sequence as Several

from cluster.core.frames import Drop, Edit, Join, Restore, Save
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
