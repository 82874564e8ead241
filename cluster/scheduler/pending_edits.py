"""Edits that wait for a frame: which cancel out, what they touch, and how many of them a frame may carry."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.frames import Drop, Edit, Join, Leave, Restore, Save
from cluster.core.limits import MAX_EDITS, MAX_JOINED_BYTES

MOST = MAX_EDITS // 2
"""A frame's edits before it has a step; what that brings along takes far less than the other half."""


def tidy(edits: Sequence[Edit]) -> list[Edit]:
    """Without those that would do nothing: of a sequence that joins and leaves here, of a prefix kept and dropped here.

    What is copied from such a sequence on the way keeps all of its edits.
    """
    used = {e.prefix for e in edits if isinstance(e, Restore)}
    dropped = {e.prefix for e in edits if isinstance(e, Drop)}
    idle = {e.prefix for e in edits if isinstance(e, Save) and e.prefix in dropped and e.prefix not in used}
    rest = [e for e in edits if not (isinstance(e, Save | Drop) and e.prefix in idle)]
    copied = {e.sequence for e in rest if isinstance(e, Save)}
    joined = {e.sequence for e in rest if isinstance(e, Join)}
    gone = {e.sequence for e in rest if isinstance(e, Leave)} & joined - copied
    return [e for e in rest if isinstance(e, Drop) or e.sequence not in gone]


def first_load(edits: Sequence[Edit]) -> int:
    """How many of ``edits`` a frame of its own has to take away, so that the rest may fit one; 0 where all do.

    Grammars and edits of one frame are bounded.
    """
    total = 0
    for i, edit in enumerate(edits):
        grammar = edit.sampling.grammar if isinstance(edit, Join) else None
        total += len(grammar.source.encode()) if grammar else 0
        if total > MAX_JOINED_BYTES or i >= MOST:
            return max(i, 1)
    return 0
