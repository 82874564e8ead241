"""The errors of jobs that exceed a limit or crash. Each fails one request and names the limit."""

from __future__ import annotations

from cluster.core.errors import BadCheckpoint, InvalidGrammar, InvalidRequest, MacpipeError
from cluster.sandbox.job_messages import CheckGrammar, Encode, Job, Limits, OpenModel, ReadCalls, WarmUp

__all__ = ["CRASHED", "cpu_exceeded", "job_error", "memory_exceeded"]

CRASHED = "makes a library fail"


def job_error(job: Job, why: str) -> MacpipeError:
    """Return the error of a failed job; ``why`` is a predicate, such as "needs too much memory"."""
    match job:
        case OpenModel():
            return BadCheckpoint(f"loading the tokenizer in {job.folder!r} {why}; is the model from a trusted source?")
        case WarmUp():
            return BadCheckpoint(
                f"rendering one message with the chat template {why}; is the model from a trusted source?"
            )
        case Encode():
            return InvalidRequest(f"tokenizing this text {why}; make it shorter", field="prompt")
        case CheckGrammar():
            kind = job.grammar.kind.value
            return InvalidGrammar(f"the {kind} cannot be compiled: it {why}; make it simpler", field=kind)
        case ReadCalls():
            return InvalidRequest(f"reading the tool calls of this answer {why}")
        case _:
            return InvalidRequest(
                f"rendering these messages with the model's chat template {why}; make them shorter", field="messages"
            )


def cpu_exceeded(limits: Limits) -> str:
    """Return the predicate for ``job_error``."""
    return f"needs more than {limits.cpu_s:.1f} s of CPU time"


def memory_exceeded(limits: Limits) -> str:
    """Return the predicate for ``job_error``."""
    return f"needs more than {limits.memory_bytes >> 20} MiB of memory"
