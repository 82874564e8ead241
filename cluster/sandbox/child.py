"""The sandbox process: loads one model's tokenizer and does jobs one after another, each within its limits.

Jobs come on stdin and replies go to stdout. It ends when stdin does, so it never outlives its parent. A job that
exceeds its CPU time ends the process by SIGPROF. Where memory runs out, Python raises an error and Rust aborts.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from cluster.core.errors import BadFrame, InvalidGrammar, InvalidRequest, MacpipeError
from cluster.core.request import ChatMessage
from cluster.model.panics import is_panic
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.sandbox.failures import CRASHED, job_error, memory_exceeded
from cluster.sandbox.job_messages import (
    HEADER,
    CheckGrammar,
    Converse,
    Encode,
    Job,
    JobFailed,
    Limits,
    OpenModel,
    PromptReply,
    Ready,
    Reply,
    WarmUp,
    pack_reply,
    pack_tokens,
    payload_size,
    unpack_job,
)

HELLO: Final = (ChatMessage("user", "Hello"),)


class JobRunner:
    """Does jobs with the tokenizer that the first of them names."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def reply(self, job: Job) -> bytes:
        """Do a job within its limits, and serialize what comes of it."""
        try:
            with limited(job.limits):
                return pack_reply(self.do(job))
        except BaseException as error:
            failed = _failure(job, error)
        return pack_reply(JobFailed(failed.reason, failed.sentence, failed.field))

    def do(self, job: Job) -> Reply:
        """Do a job without limits. Raises whatever the job raises."""
        if isinstance(job, OpenModel):
            self._open(job)
            return Ready()
        if self._tokenizer is None:
            raise BadFrame("a job came before the model was opened")
        match job:
            case WarmUp():
                with suppress(InvalidRequest):  # of a template that wants another conversation; it is compiled by then
                    self._tokenizer.chat(HELLO)
                return Ready()
            case Encode():
                return _prompt(self._tokenizer, self._tokenizer.encode(job.text), job)
            case Converse():
                return _conversation(self._tokenizer, job)
            case CheckGrammar():
                self._tokenizer.check_grammar(job.grammar)
                return Ready()

    def _open(self, job: OpenModel) -> None:
        self._tokenizer = load_tokenizer(Path(job.folder))
        if job.grammars:
            with suppress(InvalidGrammar):  # of a tokenizer that no grammar can be bound to; each check says so
                self._tokenizer.grammars()


def _failure(job: Job, error: BaseException) -> MacpipeError:
    """The error that the parent is told. Raises ``error`` where it is neither an error nor a panic."""
    if isinstance(error, MacpipeError):
        return error
    if isinstance(error, MemoryError):
        return job_error(job, memory_exceeded(job.limits))
    if isinstance(error, Exception):
        return job_error(job, f"fails with {type(error).__name__}")
    if is_panic(error):
        return job_error(job, CRASHED)
    raise error


def _prompt(tokenizer: Tokenizer, ids: tuple[int, ...], job: Encode | Converse) -> PromptReply:
    if len(ids) > job.max_tokens:
        return PromptReply(len(ids), b"")
    return PromptReply(len(ids), pack_tokens(ids), tuple(tokenizer.token_texts(ids)) if job.texts else ())


def _conversation(tokenizer: Tokenizer, job: Converse) -> PromptReply:
    """Render and tokenize, and find out what binds the answer."""
    calling = tokenizer.calling(job.options)
    if calling and job.grammar:
        raise InvalidRequest(
            f"tool_choice asks for a call of a tool, the format for a {job.grammar.kind.value}; an answer cannot be "
            "both: leave one of them out",
            field="tool_choice",
        )
    ids = tokenizer.chat(job.messages, job.options)
    parsing, wanted = tokenizer.parsing(ids, job.options), calling or job.grammar
    prompt = _prompt(tokenizer, ids, job)
    bound = tokenizer.bound(wanted, parsing) if wanted else None
    return PromptReply(prompt.count, prompt.ids, prompt.texts, parsing.thinking, bound)


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Run the body within ``limits``: SIGPROF ends the process where it takes more CPU time, memory is refused to it.

    Only Linux limits memory here. Elsewhere the parent watches it.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + limits.memory_bytes, unlimited[1]))
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process, plus its stack."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    return pages * resource.getpagesize()


def _end_with_parent() -> None:
    """End this process once the other end of stdin is closed, also in the middle of a job."""
    poll = select.poll()
    poll.register(0, 0)  # nothing asked for: only its end is reported
    poll.poll()
    os._exit(0)


def _separate_stdout() -> BinaryIO:
    """Keep stdout for replies alone: whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _silence() -> None:
    """Drop what libraries print from now on: a panic prints what it was given, which may be a prompt."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _read(jobs: BinaryIO) -> Job | None:
    """Read the next job; None at the end. Raises ``BadFrame``."""
    header = jobs.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    size = payload_size(header)
    body = jobs.read(size)
    return unpack_job(body) if len(body) == size else None


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to us too; the parent ends us
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # it would hold prompts
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    worker, replies = JobRunner(), _separate_stdout()
    while (job := _read(sys.stdin.buffer)) is not None:
        reply = worker.reply(job)
        if isinstance(job, OpenModel):
            _silence()
        with suppress(BrokenPipeError):
            replies.write(reply)
            replies.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
