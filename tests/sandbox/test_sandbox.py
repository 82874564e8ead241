"""Real sandbox processes: their answers are the tokenizer's, and exceeding a limit ends only its own job."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.core.errors import BadCheckpoint, Busy, InvalidGrammar, InvalidRequest, NotServing, PromptTooLong
from cluster.core.limits import MAX_LISTED_TOKENS, MAX_PROMPT_BYTES, WHOLE_PROMPT_BYTES
from cluster.core.request import ChatMessage, ChatOptions, Grammar, GrammarKind, Tool
from cluster.model.checkpoint import BUNDLED
from cluster.model.tokenizer import load_tokenizer
from cluster.sandbox import process as process_module
from cluster.sandbox.child_process import ChildProcess
from cluster.sandbox.job_messages import Encode, Limits, OpenModel, WarmUp, pack_job
from cluster.sandbox.pool import ProcessPool
from cluster.sandbox.process import SandboxProcess
from cluster.sandbox.sandboxed_tokenizer import OPENING, SandboxedTokenizer, prompt_limits
from effort import chosen
from integration.daemons import alive

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

MIB = 2**20
PLAIN = ChatOptions()
GOOD = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object","properties":{"a":{"type":"string"}}}')
COSTLY = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"integer","multipleOf":999983}')
TEMPLATE = """{%- if messages[0].content == 'double' -%}
{%- set ns = namespace(a='a') -%}{%- for i in range(40) -%}{%- set ns.a = ns.a ~ ns.a -%}{%- endfor -%}
{%- elif messages[0].content == 'loop' -%}
{%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif messages[0].content == 'long' -%}{{ 'a' * 9000000 }}
{%- endif -%}
{{ messages[0].content }}"""
"""Of a model that behaves until it is asked not to."""
SLOW_TEXT = "a" * 60 + "!"
"""The library of the hostile tokenizer's regular expression gives up at this, with a panic."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template and tokenizer can be made to misbehave."""
    folder = shutil.copytree(BUNDLED / "faq", tmp_path_factory.mktemp("hostile") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}
    config.write_text(json.dumps(settings | {"tool_parser_type": "gemma4"}))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": r"(a+)+$|(x+x+)+y"},
        "behavior": "Isolated",
        "invert": False,
    }
    others = [content["pre_tokenizer"]] if content.get("pre_tokenizer") else []
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *others]}
    file.write_text(json.dumps(content))
    return folder


@asynccontextmanager
async def opened(folder: Path, *, split_points: bool = False) -> AsyncIterator[SandboxedTokenizer]:
    text = SandboxedTokenizer(folder, split_points=split_points)
    await text.open()
    try:
        yield text
    finally:
        await text.close()
        assert text.pids == ()


@pytest.fixture(scope="module")
async def plain_sandbox(anyio_backend: str) -> AsyncIterator[SandboxedTokenizer]:
    """A sandbox of a good model, for tests that do not depend on its processes."""
    async with opened(BUNDLED / "faq") as text:
        yield text


@pytest.fixture(scope="module")
async def hostile_sandbox(anyio_backend: str, hostile: Path) -> AsyncIterator[SandboxedTokenizer]:
    """The same of the hostile model."""
    async with opened(hostile) as text:
        yield text


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever held; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    peak = next((line for line in lines if "VmHWM" in line), "VmHWM: 0 kB")  # a zombie has none
    return int(peak.split()[1]) * 1024


def cpu_ticks(pid: int) -> int:
    """Processor time that a process has had, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def until_computing(pid: int, before: int) -> None:
    """Wait until a process that had ``before`` ticks works on its job."""
    while cpu_ticks(pid) < before + 5:
        await asyncio.sleep(0.01)


async def until_gone(pid: int) -> None:
    while alive(pid):
        await asyncio.sleep(0.01)


async def test_prompts_are_those_of_the_tokenizer(plain_sandbox: SandboxedTokenizer) -> None:
    folder = BUNDLED / "faq"
    tokenizer = load_tokenizer(folder)
    messages = (ChatMessage("user", "What is a hop? 漢字"),)
    text = plain_sandbox
    ids = tokenizer.encode("What is a hop? 漢字")
    told = await text.encode("What is a hop? 漢字", 100, texts=True)
    assert told.ids == ids
    assert list(told.texts) == tokenizer.token_texts(ids)
    chat = await text.converse(messages, PLAIN, GOOD, 100)
    assert chat.ids == tokenizer.chat(messages)
    assert chat.grammar == GOOD
    counted = await text.encode("word " * 10_000, 5)
    assert (counted.count > 10_000, counted.ids) == (True, ())
    with pytest.raises(InvalidRequest, match="chat_template_kwargs: 'frobnicate'") as refused:
        await text.converse(messages, replace(PLAIN, template='{"frobnicate": 1}'), None, 100)
    assert refused.value.field == "chat_template_kwargs"


async def test_a_longer_conversation_of_the_same_client_has_the_tokens_of_a_fresh_one(
    plain_sandbox: SandboxedTokenizer,
) -> None:
    tokenizer = load_tokenizer(BUNDLED / "faq")
    messages: tuple[ChatMessage, ...] = (ChatMessage("user", "What is a hop? " * 300),)
    for turn in range(4):
        for owner in ("amy", "bob"):
            chat = await plain_sandbox.converse(messages, PLAIN, None, 10_000, owner=owner)
            assert chat.ids == tokenizer.chat(messages)
        messages += (ChatMessage("assistant", "It is a hop."), ChatMessage("user", f"And {turn}?"))


async def test_split_points_of_conversations_come_where_they_are_asked_for(plain_sandbox: SandboxedTokenizer) -> None:
    messages = (ChatMessage("user", "What is a hop?"),)
    plain = await plain_sandbox.converse(messages, PLAIN, None, 100)
    assert plain.split_points == ()
    async with opened(BUNDLED / "faq", split_points=True) as text:
        found = await text.converse(messages, PLAIN, None, 100)
        assert found.ids == plain.ids
        tokenizer = load_tokenizer(BUNDLED / "faq")
        split = tokenizer.find_split_points(messages, PLAIN, tokenizer.render(messages))
        assert (found.split_points, found.borders) == split
        assert found.split_points
        assert (await text.converse(messages, PLAIN, None, 1)).split_points == ()
        assert (await text.encode("What is a hop?", 100)).split_points == ()


@pytest.mark.long
async def test_4_mib_of_random_text_are_tokenized(plain_sandbox: SandboxedTokenizer, rng: random.Random) -> None:
    """Nearly each byte is a token: no text of that length takes more memory."""
    text = "".join(rng.choices(string.printable, k=MAX_PROMPT_BYTES))
    counted = await plain_sandbox.encode(text, MAX_PROMPT_BYTES)
    assert counted.count > MAX_PROMPT_BYTES // 2


async def test_a_long_text_of_too_many_tokens_is_refused_within_a_job_s_memory(
    plain_sandbox: SandboxedTokenizer, rng: random.Random
) -> None:
    """Tokenized whole, it takes 1.4 GiB."""
    before = {pid: peak_bytes(pid) for pid in plain_sandbox.pids}
    text = "".join(rng.choices(string.printable, k=MAX_PROMPT_BYTES))
    with pytest.raises(PromptTooLong, match=rf"has {MAX_PROMPT_BYTES} bytes and more than {MAX_LISTED_TOKENS} tokens"):
        await plain_sandbox.encode(text, 1000)
    with pytest.raises(PromptTooLong, match="tokens") as refused:
        await plain_sandbox.converse((ChatMessage("user", text),), PLAIN, None, 1000)
    assert refused.value.field == "messages"
    peaks = {pid: peak_bytes(pid) for pid in plain_sandbox.pids}
    assert all(peak - before.get(pid, peak) < 256 * MIB for pid, peak in peaks.items())
    assert max(peaks.values()) < 512 * MIB  # a process holds 180 MiB before its first job


@pytest.mark.parametrize("size", [MAX_PROMPT_BYTES, WHOLE_PROMPT_BYTES, 1])
def test_a_job_s_memory_follows_from_its_bytes_and_from_the_tokens_that_it_may_have(size: int) -> None:
    served, longest = prompt_limits(size, 128 * 1024), prompt_limits(size, 2**23)
    assert served.memory_bytes <= longest.memory_bytes <= 256 * MIB + 384 * size
    assert size > WHOLE_PROMPT_BYTES or longest.memory_bytes == 256 * MIB
    assert served.memory_bytes <= 640 * MIB


async def test_calls_are_read_and_those_that_cost_too_much_are_content(hostile_sandbox: SandboxedTokenizer) -> None:
    """The parser of this format needs the square of the time for twice the text, and cannot be interrupted."""
    tools = (Tool("weather"),)
    (call,) = await hostile_sandbox.read_calls('call:weather{city:<|"|>Oslo<|"|>}', tools)
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
    assert await hostile_sandbox.read_calls("call:f{" * 4000, tools) == ()
    assert await hostile_sandbox.read_calls("call:weather{}" * 300, tools) == ()
    assert len(await hostile_sandbox.read_calls("call:weather{}" * 256, tools)) == 256


async def test_a_grammar_that_costs_too_much_is_refused_and_delays_no_prompt(plain_sandbox: SandboxedTokenizer) -> None:
    text = plain_sandbox
    check = asyncio.create_task(text.check_grammar(COSTLY))
    assert (await text.encode("hello", 100)).count > 0
    assert not check.done()
    with pytest.raises(InvalidGrammar, match=r"cannot be compiled: it needs more than 0\.5 s of CPU time") as refused:
        await check
    assert refused.value.field == "json_schema"
    await text.check_grammar(GOOD)  # by the process that replaced the one that was ended
    with pytest.raises(InvalidGrammar, match="CPU time"):
        await text.check_grammar(COSTLY)  # it is known by now
    with pytest.raises(InvalidGrammar, match="cannot be compiled"):
        await text.check_grammar(Grammar(GrammarKind.REGEX, "("))


async def test_large_prompts_delay_no_small_one(plain_sandbox: SandboxedTokenizer, rng: random.Random) -> None:
    """However many large ones wait: they have their own process."""
    words = [rng.randbytes(6).hex() for _ in range(1000)]
    large = [asyncio.create_task(plain_sandbox.encode(" ".join(rng.choices(words, k=40_000)), 0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert (await plain_sandbox.encode("What is a hop?", 100)).count > 0
    assert not any(task.done() for task in large)
    assert min([(await task).count for task in large]) > 40_000


async def test_a_hostile_model_fails_the_requests_that_set_it_off(hostile_sandbox: SandboxedTokenizer) -> None:
    text = hostile_sandbox
    pids = text.pids
    with pytest.raises(InvalidRequest, match="needs more than 256 MiB of memory"):
        await text.converse((ChatMessage("user", "double"),), PLAIN, None, 100)
    assert (await text.converse((ChatMessage("user", "fine"),), PLAIN, None, 100)).count > 0
    assert max(map(peak_bytes, pids)) < 512 * MIB
    with pytest.raises(InvalidRequest, match="messages have 9000004 characters; at most"):
        await text.converse((ChatMessage("user", "long"),), PLAIN, None, 100)
    with pytest.raises(InvalidRequest, match="the model's tokenizer fails on this text") as panicked:
        await text.encode(SLOW_TEXT, 100)
    assert "aaa" not in panicked.value.sentence
    with pytest.raises(InvalidRequest, match=r"chat template needs more than 0\.5 s of CPU time"):
        await text.converse((ChatMessage("user", "loop"),), PLAIN, None, 100)
    assert (await text.encode("fine", 100)).count > 0


async def test_closing_ends_a_job_and_every_process(hostile: Path) -> None:
    text = SandboxedTokenizer(hostile)
    await text.open()
    pids = text.pids
    endless = Limits(60.0, 256 * MIB, 60.0)
    job = asyncio.create_task(text._text.run(Encode(1, False, endless, "x" * 4000 + "a" * 4_000_000)))
    await asyncio.sleep(0)
    await text.close()
    with pytest.raises(NotServing):
        await job
    with pytest.raises(NotServing):
        await text.encode("hello", 100)
    assert not any(alive(pid) for pid in pids)


async def test_a_job_whose_caller_went_away_still_ends(hostile: Path) -> None:
    async with opened(hostile) as text:
        (pid,) = text.pids
        before = cpu_ticks(pid)
        job = asyncio.create_task(text.converse((ChatMessage("user", "loop"),), PLAIN, None, 100))
        await until_computing(pid, before)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await until_gone(pid)
        assert (await text.encode("fine", 100)).count > 0


async def test_one_that_ends_in_the_middle_of_its_answer_is_given_up(hostile: Path) -> None:
    """Its socket is full of bytes that nobody reads any more."""
    async with opened(hostile) as text:
        (process,) = text._text._processes
        process._child._writer.write(pack_job(Encode(10**6, True, Limits(60.0, 2**30, 60.0), "word " * 200_000)))
        while len(process._child._reader._buffer) <= MIB:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        await process.stop()
        assert not alive(process.pid)


@pytest.mark.parametrize("times", chosen([1, 3], 1))
async def test_a_start_that_is_cancelled_leaves_nothing(times: int) -> None:
    for _ in range(times):
        task = asyncio.create_task(SandboxProcess.start())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_too_many_that_wait_are_told_to_come_back() -> None:
    pool = ProcessPool((OpenModel(str(BUNDLED / "faq"), False, OPENING),), size=1, waiting=1)
    limits = Limits(1.0, 64 * MIB, 20.0)
    first = asyncio.create_task(pool.run(Encode(9, False, limits, "a")))
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="1 requests are waiting") as refused:
        await pool.run(Encode(9, False, limits, "b"))
    assert refused.value.retry_after_s
    await first
    await pool.close()


async def test_memory_is_watched_where_the_system_does_not_limit_it(
    hostile_sandbox: SandboxedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = hostile_sandbox
    monkeypatch.setattr(process_module, "resident_bytes", lambda pid: 2**40)
    with pytest.raises(InvalidRequest, match="needs more than 256 MiB of memory"):
        await text.converse((ChatMessage("user", "loop"),), PLAIN, None, 100)


async def test_a_process_that_keeps_too_much_memory_is_replaced(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(hostile) as text:
        (pid,) = text.pids
        monkeypatch.setattr(process_module, "SANDBOX_MEMORY_BYTES", -(2**40))
        monkeypatch.setattr(process_module, "MEMORY_WATCH_S", 0.0)
        assert (await text.encode("word " * 10_000, 9)).count > 10_000
        await until_gone(pid)
        monkeypatch.undo()
        assert (await text.encode("hello", 9)).count > 0


async def test_a_tokenizer_that_cannot_be_loaded_is_a_bad_checkpoint(tmp_path: Path) -> None:
    text = SandboxedTokenizer(tmp_path)
    with pytest.raises(BadCheckpoint, match="has no tokenizer"):
        await text.open()
    assert text.pids == ()
    await text.close()


async def test_a_template_that_takes_too_long_is_a_bad_checkpoint(hostile: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hostile, tmp_path / "model")
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loop)
    pool = ProcessPool((OpenModel(str(folder), False, OPENING), WarmUp(Limits(0.5, 256 * MIB, 60.0))))
    with pytest.raises(BadCheckpoint, match=r"with the chat template needs more than 0\.5 s of CPU time"):
        await pool.open()
    assert pool.pids == ()
    await pool.close()


PARENT = """
import asyncio, sys
from pathlib import Path
from cluster.core.request import ChatMessage, ChatOptions
from cluster.sandbox.job_messages import Converse, Limits
from cluster.sandbox.sandboxed_tokenizer import SandboxedTokenizer

async def main():
    text = SandboxedTokenizer(Path(sys.argv[1]))
    await text.open()
    endless = Limits(60.0, 2**30, 60.0)
    job = Converse(9, False, endless, (ChatMessage("user", "loop"),), ChatOptions(), None)
    print(*text.pids, flush=True)
    asyncio.create_task(text._text.run(job))
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_process_that_takes_long_to_end_is_waited_for_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    child = await ChildProcess.start("cluster.sandbox.child", {}, "a process")
    process = child._process
    wait = process.wait

    def wait_too_briefly(timeout: float | None = None) -> int:
        if timeout is not None:
            raise subprocess.TimeoutExpired("child", timeout)
        return wait()

    monkeypatch.setattr(process, "wait", wait_too_briefly)
    await child.end()
    async with asyncio.timeout(20):
        while child.exit_code is None:
            await asyncio.sleep(0.01)
    assert child.exit_code == -signal.SIGKILL


async def test_a_process_does_not_outlive_its_parent(hostile: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(hostile)]
    parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert parent.stdout
    pid = int(await parent.stdout.readline())
    await until_computing(pid, cpu_ticks(pid))
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await until_gone(pid)
