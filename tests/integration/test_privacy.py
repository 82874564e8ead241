"""Prompts and answers are kept nowhere: real daemons that log everything they can, and a word to search for."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.client import Client
from cluster.core.errors import MacpipeError
from cluster.discovery.browse import browse
from integration.daemons import Cluster, bound, children, free_port, watchdog_pipe

pytestmark = [pytest.mark.timeout(240), pytest.mark.long]
LOUD = "import logging, sys\nlogging.basicConfig(level=logging.DEBUG, stream=sys.stderr)\n"
"""What every process runs as it begins: all loggers, those of libraries too, say all that they have to say."""


@pytest.fixture
def word() -> str:
    """Return a word that nobody writes by chance, as one piece of every tokenizer's text."""
    return f"xyzzy{secrets.token_hex(6)}"


def loudly(folder: Path) -> Any:
    """A way to launch daemons."""
    (folder / "sitecustomize.py").write_text(LOUD)
    places = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": places, "GRPC_VERBOSITY": "DEBUG", "MACPIPE_DEBUG": "1"}

    def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                bound(*arguments), stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True,
                env=environment,
            )  # fmt: skip

    return launch


def bodies(word: str) -> Iterator[tuple[str, Any]]:
    """Return requests with the word in every possible place: some are answered, most are refused."""
    said = [{"role": "user", "content": f"say {word}"}]
    short: dict[str, Any] = {"max_tokens": 2}
    yield "/v1/completions", {"prompt": f"{word} and", **short}
    yield "/v1/completions", {"prompt": f"{word} and", "stream": True, **short}
    yield "/v1/chat/completions", {"messages": said, **short}
    yield "/v1/chat/completions", {"messages": said, "stream": True, **short}
    yield "/v1/messages", {"model": "default", "messages": said, "system": word, **short}
    yield "/v1/responses", {"input": f"say {word}", "max_output_tokens": 2}
    yield "/tokenize", {"prompt": "a" + word, "model": "no-such-model"}
    yield "/v1/completions", {"prompt": {"text": word}}
    yield "/v1/completions", {"prompt": [word, 5, {"a": word}]}
    yield "/v1/completions", {"prompt": word * 1000, **short}
    yield "/v1/completions", {"prompt": word, "max_tokens": word}
    yield "/v1/completions", {"prompt": word, "max_tokens": 10**6}
    yield "/v1/completions", {"prompt": word, "temperature": 9, "stop": [word]}
    yield "/v1/completions", {"prompt": word, "stop": [word] * 99}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": [word]}]}]}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "file", "file": word}]}]}
    yield "/v1/chat/completions", {"messages": [{"role": "tool", "content": word}]}
    yield "/v1/chat/completions", {"messages": [{"role": "assistant", "content": None}, *said], "tools": [{"x": word}]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": f'{{"a": "{word}'}}
    yield "/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    yield "/v1/chat/completions", {"messages": said, "response_format": {"type": "json_schema", "json_schema": word}}
    yield "/v1/chat/completions", {"messages": said, "chat_template_kwargs": {"enable_thinking": word}}
    yield "/v1/messages", {"model": "default", "max_tokens": 1, "messages": [{"role": word, "content": word}]}
    yield (
        "/v1/responses",
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_image", "x": word}]}]},
    )
    yield "/v1/completions", f'{{"prompt": "{word}", '.encode()
    yield "/v1/completions", f'{{"prompt": "{word}"}} {word}'.encode()
    yield "/v1/completions", word.encode() + b"\xff"


def test_no_word_of_anybody_is_kept_told_or_shown(cluster: Cluster, llama: Path, word: str) -> None:
    launch, port, http = loudly(cluster.folder), free_port(), f"127.0.0.1:{free_port()}"
    workers = [cluster.worker(name, launch=launch) for name in ("ada", "bob")]
    options = ("--workers", "2", "--port", str(port), "--wait", "90", "--http", http)
    serve = cluster.serve(llama, *options, launch=launch)
    serve.wait_for(http)
    with Client(f"127.0.0.1:{port}", timeout_s=60) as client:
        while client.cluster().state != "serving":
            pass
        told = [*ask_over_http(f"http://{http}", word), *ask_over_grpc(client, word, workers[1].process.pid)]
        told += [repr(client.cluster()), repr(client.models())]
    told += [httpx.get(f"http://{http}{path}").text for path in ("/metrics", "/health", "/v1/models", "/")]
    told += asyncio.run(announced(cluster.name))
    told += command_lines([d.process.pid for d in cluster.daemons])
    assert not [one for one in told if word in one]
    logs = [daemon.said() for daemon in cluster.daemons]
    assert all("DEBUG" in log for log in logs), "the daemons were not as loud as they should have been"
    assert not [line for log in logs for line in log.splitlines() if word in line]
    kept = [file for file in cluster.folder.rglob("*") if file.is_file()]
    assert not [file for file in kept if word.encode() in file.read_bytes()]


def ask_over_http(base: str, word: str) -> list[str]:
    """Every body once; what was said to the refused ones, with all headers."""
    refusals, answered = [], 0
    with httpx.Client(base_url=base, timeout=60) as client:
        for path, body in bodies(word):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            reply = client.post(path, content=content)
            assert reply.status_code != 500, reply.text
            if reply.status_code == 200:
                answered += 1
            else:
                refusals.append(f"{path} {reply.status_code} {reply.headers} {reply.text}")
    assert answered >= 6
    assert len(refusals) >= 15
    return refusals


def ask_over_grpc(client: Client, word: str, worker: int) -> list[str]:
    """Cause answers, refusals, an abandoned answer, and one whose stage is killed; return the errors' words."""
    client.generate(f"{word} and", max_tokens=2)
    client.chat([("user", word)], max_tokens=2)
    refused = []
    for options in ({"max_tokens": 10**6}, {"stop": [word] * 99}, {"regex": f"({word}"}, {"request_id": f"a\n{word}"}):
        with pytest.raises(MacpipeError) as error:
            client.generate(word, **options)  # type: ignore[arg-type]
        refused.append(f"{error.value} {error.value.details} {error.value.field}")
    with client.stream(f"{word} and on", max_tokens=200, ignore_eos=True) as left:
        next(iter(left))
    with client.stream(f"{word} and on", max_tokens=60, ignore_eos=True) as stream:
        tokens = iter(stream)
        next(tokens)
        for engine in children(worker):
            os.kill(engine, signal.SIGKILL)
        assert sum(1 for _ in tokens) == 59
    return refused


async def announced(cluster: str) -> list[str]:
    """Return what is announced of this cluster on the network."""
    async with browse(cluster) as source:
        while len(found := source.current()) < 2:
            await source.changed(10)
    return [repr(one) for one in found]


def command_lines(pids: list[int]) -> list[str]:
    """Return the command lines of the daemons and their children, which everybody on this machine can read."""
    everybody = [p for pid in pids for p in (pid, *children(pid))]
    return [Path(f"/proc/{p}/cmdline").read_text() for p in everybody]
