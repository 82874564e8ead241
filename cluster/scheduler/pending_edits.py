"""Rules for pending edits: which cancel each other out, and how many a frame may carry."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.frames import Drop, Edit, Join, Leave, Persist, Restore, Save
from cluster.core.limits import MAX_EDITS, MAX_JOINED_BYTES, MAX_JOINED_ELEMENTS

MAX_PENDING_EDITS = MAX_EDITS // 2
"""Maximum pending edits for the next frame. The edits that come with its step need far less than the other half."""

_JOIN_VALUES = 25
"""Values of a join without biases, on the wire."""


def tidy(edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits without those that cancel out.

    A sequence that joins and leaves within ``edits`` needs none of its edits, unless a prefix is saved from it. A
    prefix that is saved and dropped within ``edits`` needs neither edit, unless it is restored in between. It is not
    written to disk either.
    """
    used = {e.prefix for e in edits if isinstance(e, Restore)}
    dropped = {e.prefix for e in edits if isinstance(e, Drop)}
    idle = {e.prefix for e in edits if isinstance(e, Save) and e.prefix in dropped and e.prefix not in used}
    rest = [e for e in edits if not (isinstance(e, Save | Drop | Persist) and e.prefix in idle)]
    copied = {e.sequence for e in rest if isinstance(e, Save)}
    joined = {e.sequence for e in rest if isinstance(e, Join)}
    gone = {e.sequence for e in rest if isinstance(e, Leave)} & joined - copied
    return [e for e in rest if isinstance(e, Drop | Persist) or e.sequence not in gone]


def first_load(edits: Sequence[Edit]) -> int:
    """Return how many leading edits to send in an edit-only frame; 0 if all fit into the next frame.

    Grammars, edits, and the values that joins carry are bounded in one frame.
    """
    grammar_bytes = values = 0
    for i, edit in enumerate(edits):
        if isinstance(edit, Join):
            grammar = edit.sampling.grammar
            grammar_bytes += len(grammar.source.encode()) if grammar else 0
            values += _JOIN_VALUES + 3 * len(edit.sampling.logit_bias) + (len(grammar.free_until) if grammar else 0)
        if grammar_bytes > MAX_JOINED_BYTES or values > MAX_JOINED_ELEMENTS or i >= MAX_PENDING_EDITS:
            return max(i, 1)
    return 0
