"""``macpipe bench`` from the outside, against a scripted coordinator."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from client.scripted import Coordinator, cluster_reply, finish_event, prompt_event, token_event
from cluster.core import errors
from cluster.v1 import cluster_pb2, inference_pb2

Macpipe = Any
QUICK = ("--users", "1,2", "--rounds", "1", "--tokens", "4", "--prompt", "32")


@pytest.fixture
def fast(coordinator: Coordinator) -> Coordinator:
    """Answer with the requested number of tokens, and remember the start of every prompt."""
    heard: set[tuple[int, ...]] = set()

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        ids, tokens = tuple(request.tokens.ids), request.stop.max_tokens
        yield prompt_event()
        for i in range(tokens):
            yield token_event(i, "x")
        end = finish_event(tokens, reason=inference_pb2.FINISH_REASON_LENGTH)
        kept = max((len(one) for one in heard if ids[: len(one)] == one), default=0)
        end.finish.usage.prompt_tokens, end.finish.usage.cached_tokens = len(ids), kept
        heard.add(ids)
        yield end

    coordinator.script.answer = answer  # type: ignore[method-assign]
    del coordinator.script.cluster.requests[:]
    return coordinator


def test_tables_go_to_stdout_and_progress_to_stderr(macpipe: Macpipe, fast: Coordinator, tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    done = macpipe("bench", *QUICK, "--plot", str(picture), to=fast)
    assert done.returncode == 0, done.stderr
    assert picture.read_text().startswith("<svg ")
    assert f"wrote {picture}" in done.stderr
    for words in ("of prefill", "TTFT p50", "TPOT p99", "tokens/s", "mac-a", "wire", "wait", "idle", "9.0 GiB"):
        assert words in done.stdout
    assert done.stderr.startswith("faq on 2 stages: random prompts of 32 tokens")
    assert "\n2 users: " in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_each_user_asks_twice_and_the_second_turn_goes_on_from_the_first(macpipe: Macpipe, fast: Coordinator) -> None:
    report = json.loads(macpipe("bench", *QUICK, "--json", to=fast).stdout)
    asked = [tuple(one.tokens.ids) for one in fast.script.seen if isinstance(one, inference_pb2.GenerateRequest)]
    first = [ids for ids in asked if len(ids) == 32]
    second = [ids for ids in asked if len(ids) == 32 + 4]
    assert len(second) == 3
    assert len(set(first)) == len(first), "two users asked the same"
    assert all(ids[:32] in first and ids[32:] == (100, 101, 102, 103) for ids in second)
    assert [level["users"] for level in report["levels"]] == [1, 2]
    one = report["levels"][0]
    assert one["prompts"]["kept_share"] == 0.0
    assert one["stages"][0]["compute_ms"] == pytest.approx(8.5 / 4)
    assert one["stages"][0]["layers"] == [0, 4]
    assert one["stages"][0]["bubble_share"] is None, "this coordinator counts no busy seconds"
    assert report["roofline"][0]["share"] is None


def test_a_prompt_that_was_not_kept_leaves_dashes(macpipe: Macpipe, fast: Coordinator) -> None:
    done = macpipe("bench", "--users", "1", "--rounds", "1", "--tokens", "10", "--prompt", "32", to=fast)
    assert "no room to keep" in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "400"], ["400", "context of 512", "--prompt 384"]),
        (["--tokens", "300"], ["300", "--tokens 248"]),
    ],
)
def test_what_does_not_fit_the_context_is_wrong_usage(
    macpipe: Macpipe, fast: Coordinator, arguments: list[str], words: list[str]
) -> None:
    for more in ([], ["--json"]):
        done = macpipe("bench", *arguments, *more, to=fast)
        assert (done.returncode, done.stdout) == (2, "")
        assert all(word in done.stderr for word in words), done.stderr


def test_a_refused_request_ends_the_bench_with_its_sentence(macpipe: Macpipe, fast: Coordinator) -> None:
    async def refuse(request: Any, context: Any) -> AsyncIterator[Any]:
        from cluster.transport.rich_errors import abort

        await abort(context, errors.Busy("256 requests wait", retry_after_s=2.0))
        yield

    fast.script.answer = refuse  # type: ignore[method-assign]
    done = macpipe("bench", *QUICK, to=fast)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("macpipe: 256 requests wait\n")
    assert json.loads(macpipe("bench", *QUICK, "--json", to=fast).stdout)["error"]["reason"] == "BUSY"


def test_nothing_to_measure_and_others_in_the_way_are_told(macpipe: Macpipe, fast: Coordinator) -> None:
    fast.script.cluster = cluster_reply(max_context=512)
    assert "live beside the bench: 2 other requests" in macpipe("bench", *QUICK, to=fast).stderr
    fast.script.cluster = cluster_reply(cluster_pb2.SERVING_STATE_IDLE, model="")
    done = macpipe("bench", *QUICK, to=fast)
    assert done.returncode == 1
    assert "macpipe load MODEL" in done.stderr
