"""Embeddings through the SDKs: the last state of mlx-lm's own forward, over two stages."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import signal
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from openai import BadRequestError, OpenAI

from cluster.client import AsyncClient, Client, Embeddings
from cluster.core.errors import InvalidRequest
from cluster.model.tokenizer import load_tokenizer
from compat.conftest import Served, make_tooled
from integration.daemons import Cluster

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

TEXTS = ["A hop is short.", "hop", "A hop is a journey. " * 20, "<|user|> marks", "é"]


@cache
def reference(folder: Path, text: str) -> tuple[float, ...]:
    """Return the embedding of a text as sentence-transformers defines it, with one forward of mlx-lm."""
    model, _ = load_model(folder)
    ids = load_tokenizer(folder).encode(text)
    state: list[float] = model.model(mx.array([ids]))[0, -1].astype(mx.float32).tolist()
    length = math.sqrt(sum(number * number for number in state))
    return tuple(number / length for number in state)


def close(found: Sequence[float], folder: Path, text: str) -> bool:
    return list(found) == pytest.approx(reference(folder, text), abs=1e-5)


def numbers(embedding: list[float] | str) -> list[float]:
    """Return an embedding that may be in base64 as numbers."""
    if isinstance(embedding, list):
        return embedding
    raw = base64.b64decode(embedding)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def test_openai(tooled: Served) -> None:
    with OpenAI(base_url=tooled.openai, api_key=tooled.key, max_retries=0) as client:
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            done = client.embeddings.create(model="default", input=TEXTS, **encoding)  # type: ignore[arg-type]
            assert [one.index for one in done.data] == list(range(len(TEXTS)))
            found = [numbers(one.embedding) for one in done.data]
            assert all(close(one, tooled.tooled, text) for one, text in zip(found, TEXTS, strict=True))
        ids = load_tokenizer(tooled.tooled).encode(TEXTS[0])
        (one,) = client.embeddings.create(model="default", input=list(ids)).data
        assert close(one.embedding, tooled.tooled, TEXTS[0])
        short = client.embeddings.create(model="default", input=TEXTS[0], dimensions=8)
        assert math.hypot(*short.data[0].embedding) == pytest.approx(1)
        assert len(short.data[0].embedding) == 8
        assert short.usage.prompt_tokens == short.usage.total_tokens == len(ids)
        with pytest.raises(BadRequestError, match="embeddings have 32"):
            client.embeddings.create(model="default", input="a", dimensions=33)
        with pytest.raises(BadRequestError, match="context"):
            client.embeddings.create(model="default", input=["a", "hop " * 5000])
    while tooled.live():  # the short text may end a moment after the refusal of the long one
        time.sleep(0.05)


def test_grpc_and_its_clients(tooled: Served) -> None:
    ids = list(load_tokenizer(tooled.tooled).encode(TEXTS[0]))
    with Client(tooled.grpc) as client:
        done = client.embed([*TEXTS, ids])
        assert all(close(one, tooled.tooled, text) for one, text in zip(done.vectors, [*TEXTS, TEXTS[0]], strict=True))
        assert done.prompt_tokens > len(TEXTS) + len(ids)
        assert done.model == client.models()[0].id
        (short,) = client.embed("hop", dimensions=8).vectors
        assert (len(short), math.hypot(*short)) == (8, pytest.approx(1))
        for inputs, more, field, word in (
            ("a", {"dimensions": 33}, "dimensions", "embeddings have 32"),
            (["a", "hop " * 5000], {}, "inputs", "context"),
            ([], {}, "inputs", "from 1 to"),
        ):
            with pytest.raises(InvalidRequest, match=word) as refused:
                client.embed(inputs, **more)  # type: ignore[arg-type]
            assert refused.value.field == field

    async def embed() -> Embeddings:
        async with AsyncClient(tooled.grpc) as client:
            return await client.embed("hop")

    assert close(asyncio.run(embed()).vectors[0], tooled.tooled, "hop")
    while tooled.live():
        time.sleep(0.05)


def test_texts_are_embedded_beside_answers(tooled: Served) -> None:
    """Rows of one lane: each has what it would have alone."""
    texts = [f"text {i}" for i in range(40)]
    with httpx.Client(base_url=tooled.http, headers=tooled.bearer, timeout=60) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            found = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
            assert len(list(lines)) > 1
    assert all(close(one["embedding"], tooled.tooled, text) for one, text in zip(found, texts, strict=True))


def test_ollama(tooled: Served) -> None:
    ollama: Any = pytest.importorskip("ollama", reason="ollama is not installed: pip install ollama")
    with ollama.Client(host=tooled.http, headers=tooled.bearer) as client:
        done = client.embed(model="default", input=TEXTS)
        assert all(close(one, tooled.tooled, text) for one, text in zip(done.embeddings, TEXTS, strict=True))
        assert done.prompt_eval_count > len(TEXTS)
        assert client.embed(model="default", input=[]).embeddings == []
        (one,) = client.embed(model="default", input="hop", dimensions=4).embeddings
        assert len(one) == 4
        assert close(client.embeddings(model="default", prompt="hop").embedding, tooled.tooled, "hop")


def test_a_model_that_makes_none_says_so(faq: Served) -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/api/embed", {"model": "faq", "input": "a"})):
        reply = httpx.post(f"{faq.http}{path}", json=body, headers=faq.bearer, timeout=60)
        assert reply.status_code == 400
        assert "modules.json" in reply.text
    with Client(faq.grpc) as client, pytest.raises(InvalidRequest, match=r"modules\.json"):
        client.embed("a")


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_worker_that_is_killed_while_texts_are_embedded_costs_none_of_them(tmp_path: Path) -> None:
    texts, cluster = [f"text {i} " + "hop " * 40 for i in range(64)], Cluster(tmp_path)
    try:
        cluster.worker("ada")
        lost = cluster.worker("bob")
        model = make_tooled(tmp_path / "model")
        with Client(cluster.serving(model, 2)[1], timeout_s=180) as client, ThreadPoolExecutor(1) as pool:
            embedding = pool.submit(client.embed, texts)
            while not client.cluster().requests:
                assert not embedding.done()
            os.killpg(lost.process.pid, signal.SIGKILL)
            cluster.worker("cyd")
            found = embedding.result()
            assert client.cluster().recoveries == 1
            assert {stage.worker for stage in client.cluster().stages} <= {"ada", "cyd"}
        assert all(close(one, model, text) for one, text in zip(found.vectors, texts, strict=True))
    finally:
        cluster.close()
