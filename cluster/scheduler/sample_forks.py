"""Builds the edits that start several answers (samples) of one prompt from a copy of its caches."""

from __future__ import annotations

from collections.abc import Sequence as Several

from cluster.core.frames import Drop, Edit, Join, Restore, Save
from cluster.scheduler.sequence import Sequence


def copies(leader: Sequence, followers: Several[Sequence], prefix: int) -> list[Edit]:
    """Return the edits that let ``followers`` join with a copy of the leader's caches.

    The caches hold all of the prompt but its last token. The copy is whole, so it also works for caches that cannot be
    trimmed. The same frame drops the prefix again.
    """
    edits: list[Edit] = [Save(leader.id, prefix)]
    for sequence in followers:
        request, sequence.joined = sequence.request, True
        edits += [
            Join(sequence.id, len(request.prompt), request.sampling),
            Restore(sequence.id, prefix, len(leader.fed)),
        ]
        sequence.fed.extend(leader.fed)
        sequence.cached = sequence.prefilled = len(sequence.fed)
        sequence.marks = dict(leader.marks)
        sequence.next_token = request.prompt[-1]
    return [*edits, Drop(prefix)]
