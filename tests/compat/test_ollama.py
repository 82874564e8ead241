"""The ollama package, and the llm command with its plugin for Ollama, against real daemons.

``pip install ollama llm-ollama`` (both are in the extra ``dev``).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from compat.calling_model import make_calling
from compat.conftest import ALIAS, Served

ollama: Any = pytest.importorskip("ollama", reason="ollama is not installed: pip install ollama")

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

HOP = "A hop is the journey of an activation from one stage to the next."
ASK = [{"role": "user", "content": "What is a hop?"}]
SHORT = {"temperature": 0, "num_predict": 19}


@pytest.fixture
def client(faq: Served) -> Iterator[Any]:
    with ollama.Client(host=faq.http, headers=faq.bearer) as client:
        yield client


def test_chat(client: Any) -> None:
    done = client.chat(model="faq", messages=ASK, options=SHORT)
    assert (done.message.role, done.message.content) == ("assistant", HOP)
    assert (done.model, done.done, done.done_reason, done.eval_count) == ("faq", True, "length", 19)
    assert done.prompt_eval_count == 8
    assert min(done.total_duration, done.prompt_eval_duration, done.eval_duration) > 0
    chunks = list(client.chat(model="faq:latest", messages=ASK, options=SHORT, stream=True))
    assert "".join(chunk.message.content for chunk in chunks) == HOP
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == 19


def test_a_conversation_goes_on_from_its_own_answer(client: Any) -> None:
    first = client.chat(model="faq", messages=ASK, options=SHORT)
    again = client.chat(model="faq", messages=[*ASK, first.message, *ASK], options={**SHORT, "num_predict": 3})
    assert again.prompt_eval_count > first.prompt_eval_count + 19


def test_generate(faq: Served, client: Any) -> None:
    done = client.generate(model="faq", prompt="What is a hop?", options=SHORT)
    assert (done.response, done.done_reason) == (HOP, "length")
    parts = client.generate(model="faq", prompt="What is a hop?", options={"temperature": 0}, stream=True)
    assert "".join(part.response for part in parts).startswith(HOP)
    raw = client.generate(model="faq", prompt="A hop is", raw=True, options={"temperature": 0, "num_predict": 4})
    body = {"prompt": "A hop is", "temperature": 0, "max_tokens": 4}
    continued = httpx.post(f"{faq.openai}/completions", json=body, headers=faq.bearer, timeout=60).json()
    assert raw.response == continued["choices"][0]["text"]
    stopped = client.generate(model="faq", prompt="What is a hop?", options={"temperature": 0, "stop": [" activation"]})
    assert (stopped.response, stopped.done_reason) == ("A hop is the journey of an", "stop")


def test_async(faq: Served) -> None:
    async def ask() -> list[str]:
        async with ollama.AsyncClient(host=faq.http, headers=faq.bearer) as client:
            whole = await asyncio.gather(*(client.chat(model="faq", messages=ASK, options=SHORT) for _ in range(3)))
            parts = [part async for part in await client.chat(model="faq", messages=ASK, options=SHORT, stream=True)]
            return [*(one.message.content for one in whole), "".join(part.message.content for part in parts)]

    assert asyncio.run(ask()) == [HOP] * 4


def test_models(client: Any) -> None:
    assert [model.model for model in client.list().models] == ["faq", ALIAS]
    (running,) = client.ps().models
    assert running.size == running.size_vram > 0
    shown = client.show("faq")
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo[f"{shown.details.family}.context_length"] == running.context_length
    assert client.generate(model="faq").done_reason == "load"


def test_errors(client: Any) -> None:
    for call in (lambda: client.show("llama3"), lambda: list(client.chat(model="llama3", messages=ASK, stream=True))):
        with pytest.raises(ollama.ResponseError, match="llama3 is not served") as refused:
            call()
        assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="images") as refused:
        client.generate(model="faq", prompt="x", images=[b"hi"])
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="macpipe load") as refused:
        client.pull("llama3")
    assert refused.value.status_code == 501


def test_log_probabilities(client: Any) -> None:
    done = client.chat(model="faq", messages=ASK, options=SHORT, logprobs=True, top_logprobs=2)
    assert "".join(one.token for one in done.logprobs) == HOP
    assert all(len(one.top_logprobs) == 2 for one in done.logprobs)


def switch(on: bool, level: int | str = 1) -> str:
    """Switch the lamp.

    Args:
      on: whether it should be lit
      level: how bright
    """
    return "done"


def test_formats_and_tools(tooled: Served) -> None:
    with ollama.Client(host=tooled.http, headers=tooled.bearer) as client:
        assert client.show("default").capabilities == ["completion", "tools", "thinking", "embedding"]
        schema = {"type": "object", "properties": {"on": {"enum": [True]}}, "required": ["on"],
                  "additionalProperties": False}  # fmt: skip
        done = client.chat(model="default", messages=ASK, format=schema, options={"temperature": 0})
        assert json.loads(done.message.content) == {"on": True}
        listening = client.chat(model="default", messages=ASK, tools=[switch], options={"num_predict": 3})
        assert listening.eval_count == 3
        called = {"role": "assistant", "tool_calls": [{"function": {"name": "switch", "arguments": {"on": True}}}]}
        told = {"role": "tool", "tool_name": "switch", "content": "done"}
        answered = client.chat(
            model="default", messages=[*ASK, called, told], tools=[switch], options={"num_predict": 3}
        )
        assert answered.prompt_eval_count > listening.prompt_eval_count


@pytest.mark.long
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_answered(faq: Served, tmp_path: Path, stream: bool) -> None:
    faq.serve(str(make_calling(tmp_path / "calling", "switch", {"on": True, "level": 2})))
    with ollama.Client(host=faq.http, headers=faq.bearer) as client:

        def ask(messages: list[Any]) -> Any:
            options = {"temperature": 0}
            if not stream:
                return client.chat(model="default", messages=messages, tools=[switch], options=options).message
            parts = list(client.chat(model="default", messages=messages, tools=[switch], options=options, stream=True))
            calls = [call for part in parts for call in part.message.tool_calls or ()]
            return ollama.Message(
                role="assistant", content="".join(part.message.content for part in parts), tool_calls=calls or None
            )

        called = ask(ASK)
        (call,) = called.tool_calls
        assert (call.function.name, call.function.arguments) == ("switch", {"on": True, "level": 2})
        told = {"role": "tool", "tool_name": call.function.name, "content": switch(**call.function.arguments)}
        assert ask([*ASK, called, told]).content == "OK."


def test_the_llm_command(faq: Served, tmp_path: Path) -> None:
    pytest.importorskip("llm_ollama", reason="llm-ollama is not installed: pip install llm-ollama")
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OLLAMA_HOST": faq.http, "OLLAMA_API_KEY": faq.key}

    def llm(*arguments: str, said: str = "") -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, input=said, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    options = ("-o", "temperature", "0", "-o", "num_predict", "19")
    for streaming in ((), ("--no-stream",)):
        assert llm("prompt", "-m", f"ollama/{ALIAS}", *options, *streaming, "What is a hop?") == HOP
    assert "ollama/faq" in llm("models", "list")
    assert HOP in llm("chat", "-m", "ollama/faq", *options, said="What is a hop?\nexit\n")
