"""Checks that a step is complete before a stage computes it. It knows frames, nothing of the stage's state."""

from __future__ import annotations

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Step
from cluster.core.limits import MAX_VERIFIED

__all__ = ["require_rows", "require_valid_guesses"]


def require_rows(step: Step) -> None:
    """Raise BadFrame unless the sequences are distinct and each has one row of tokens, all of the same length."""
    if not step.sequences or len(set(step.sequences)) != len(step.sequences):
        raise BadFrame(f"the step has {len(step.sequences)} sequences; they must be distinct, and at least one")
    lengths = {len(row) for row in step.tokens}
    if len(step.tokens) != len(step.sequences) or len(lengths) != 1:
        raise BadFrame(
            f"the step has {len(step.sequences)} sequences but {len(step.tokens)} rows of {sorted(lengths)} tokens"
        )
    if lengths == {0}:
        raise BadFrame(f"the step of sequence {step.sequences[0]} has no tokens")


def require_valid_guesses(step: Step) -> None:
    """Raise BadFrame unless a step of guesses decodes one sequence, and says where it starts."""
    require_rows(step)
    if len(step.sequences) > 1 or step.start is None or step.compute is Compute.PREFILL:
        raise BadFrame(f"the step of sequence {step.sequences[0]} cannot feed guesses: it must decode it alone")
    if step.sampled > MAX_VERIFIED:
        raise BadFrame(f"a step samples {step.sampled} tokens of sequence {step.sequences[0]}; at most {MAX_VERIFIED}")
