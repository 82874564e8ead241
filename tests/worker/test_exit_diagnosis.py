"""A dead engine's cause in a sentence: exit code, signal, memory, last words."""

from __future__ import annotations

import asyncio
import io
import sys
from asyncio.subprocess import PIPE

import pytest

from cluster.worker.exit_diagnosis import OutputTail, explain_exit


@pytest.mark.parametrize(
    ("code", "words", "kills", "said"),
    [
        (3, "", 0, "the engine ended with exit code 3"),
        (-11, "", 0, "the engine was ended by SIGSEGV"),
        (-6, "MTLCommandBuffer failed", 0, "the engine was ended by SIGABRT (MTLCommandBuffer failed)"),
        (-9, "", 0, "the engine was ended by SIGKILL, by hand or by the system for lack of memory"),
        (-9, "", 1, "the engine was ended by SIGKILL because memory ran out; give it less with --memory-limit"),
        (-77, "", 0, "the engine was ended by signal 77"),
    ],
)
def test_causes(code: int, words: str, kills: int, said: str) -> None:
    assert explain_exit(code, words, kills) == said


def test_what_an_allocator_said_last_counts_as_out_of_memory() -> None:
    words = "[METAL] Command buffer execution failed: Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    assert "because memory ran out" in explain_exit(-6, words)


def test_stderr_is_passed_on_and_its_last_line_kept() -> None:
    async def body() -> tuple[bytes, str]:
        code = "import sys; sys.stderr.write('one\\ntwo words\\n\\n')"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=PIPE)
        onward = io.BytesIO()
        words = OutputTail(onward)
        await asyncio.gather(words.follow(process), words.wait_for_end(), process.wait())
        return onward.getvalue(), words.line

    assert asyncio.run(body()) == (b"one\ntwo words\n\n", "two words")
