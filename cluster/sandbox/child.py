"""The sandbox process: loads one model's tokenizer and runs jobs one after another, each within its limits.

It reads jobs from stdin and writes replies to stdout. It ends when stdin closes, so it never outlives its parent. If a
job exceeds its CPU time, SIGPROF kills the process. If memory runs out, Python raises an error and Rust aborts.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from cluster.core.errors import BadFrame, InvalidGrammar, InvalidRequest, MacpipeError
from cluster.core.request import ChatMessage
from cluster.model.panics import is_panic
from cluster.model.split_points import SplitPoints
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from cluster.sandbox.child_streams import end_with_parent, separate_stdout
from cluster.sandbox.failures import CRASHED, job_error, memory_exceeded
from cluster.sandbox.job_messages import (
    HEADER,
    CallsReply,
    CheckGrammar,
    Converse,
    Encode,
    Job,
    JobFailed,
    Limits,
    OpenModel,
    PromptReply,
    ReadCalls,
    Ready,
    Reply,
    WarmUp,
    pack_reply,
    pack_tokens,
    payload_size,
    unpack_job,
)

HELLO: Final = (ChatMessage("user", "Hello"),)
SPLIT_POINTS_SHARE: Final = 0.2
"""Share of a job's CPU time that its prompt may have taken for split points, which take up to four times as long."""


class JobRunner:
    """Runs jobs with the tokenizer of the first job."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer
        self._split_points = False

    def reply(self, job: Job) -> bytes:
        """Run a job within its limits. Return the serialized reply or error."""
        try:
            with enforce_limits(job.limits):
                return pack_reply(self.do(job))
        except BaseException as error:
            failed = _failure(job, error)
        return pack_reply(JobFailed(failed.reason, failed.sentence, failed.field, failed.details))

    def do(self, job: Job) -> Reply:
        """Run a job without limits. Raises whatever the job raises."""
        if isinstance(job, OpenModel):
            self._open(job)
            return Ready()
        if self._tokenizer is None:
            raise BadFrame("a job arrived before the model was opened")
        match job:
            case WarmUp():
                with suppress(InvalidRequest):  # the template may reject this message, but it is compiled by then
                    self._tokenizer.chat(HELLO)
                return Ready()
            case Encode():
                return _prompt(self._tokenizer, self._tokenizer.encode(job.text, job.special, job.most), job)
            case Converse():
                return _conversation(self._tokenizer, job, with_split_points=self._split_points)
            case CheckGrammar():
                self._tokenizer.check_grammar(job.grammar)
                return Ready()
            case ReadCalls():
                return CallsReply(self._tokenizer.read_calls(job.body, job.tools))

    def _open(self, job: OpenModel) -> None:
        self._tokenizer = load_tokenizer(Path(job.folder))
        self._split_points = job.split_points
        if job.grammars:
            with suppress(InvalidGrammar):  # the tokenizer does not support grammars; each check reports that
                self._tokenizer.grammars()


def _failure(job: Job, error: BaseException) -> MacpipeError:
    """Return the error to report to the parent. Raise ``error`` itself if it is neither an Exception nor a panic."""
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


def _conversation(tokenizer: Tokenizer, job: Converse, *, with_split_points: bool) -> PromptReply:
    """Render and tokenize a conversation, and return the grammar of its answer. Raises InvalidRequest."""
    begun = time.process_time()
    calling = tokenizer.required_call_grammar(job.options)
    if calling and job.grammar:
        raise InvalidRequest(
            f"tool_choice requires a tool call, but the format requires a {job.grammar.kind.value}; an answer cannot "
            "be both: leave one of them out",
            field="tool_choice",
        )
    rendered = tokenizer.render(job.messages, job.options, job.most, job.owner)
    ids = rendered.ids
    parsing = tokenizer.parsing(ids, job.options)
    prompt = _prompt(tokenizer, ids, job)
    grammar = calling or job.grammar
    if grammar:
        grammar = tokenizer.defer_past_reasoning(grammar, parsing, calls=calling is not None)
    split = SplitPoints()
    if with_split_points and prompt.ids and time.process_time() - begun < job.limits.cpu_s * SPLIT_POINTS_SHARE:
        split = tokenizer.find_split_points(job.messages, job.options, rendered)
    ignored = tokenizer.ignored_options(job.options)
    return PromptReply(prompt.count, prompt.ids, prompt.texts, parsing.thinking, grammar, *split, ignored)


@contextmanager
def enforce_limits(limits: Limits) -> Iterator[None]:
    """Run the body within ``limits``. If it exceeds its CPU time, SIGPROF kills the process.

    If it exceeds its memory, allocations fail. Only Linux limits memory here; elsewhere the parent watches it.
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
    """Return the bytes of this process that count towards RLIMIT_DATA, plus its stack."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    return pages * resource.getpagesize()


def _silence() -> None:
    """Discard all further output of libraries: a panic prints its input, which may be a prompt."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _read(jobs: BinaryIO) -> Job | None:
    """Read the next job; return None at the end of input. Raises ``BadFrame``."""
    header = jobs.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    size = payload_size(header)
    body = jobs.read(size)
    return unpack_job(body) if len(body) == size else None


def main() -> int:
    """Serve jobs from stdin until it closes. Return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal signals the whole group, but only the parent ends this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    # A core dump would contain prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    end_with_parent()
    worker = JobRunner()
    replies = separate_stdout()
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
