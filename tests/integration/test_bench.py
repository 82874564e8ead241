"""``macpipe bench`` against real daemons with the bundled model: its output, and that its figures are true."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from cluster.client import Client
from integration.daemons import command, serve_model

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(120)]

USERS, PROMPT, TOKENS, ROUNDS = (1, 3), 40, 12, 2


def bench(address: str, *more: str) -> subprocess.CompletedProcess[str]:
    sizes = ["--prompt", str(PROMPT), "--tokens", str(TOKENS), "--rounds", str(ROUNDS)]
    arguments = ["bench", "--users", ",".join(map(str, USERS)), *sizes, "--coordinator", address, *more]
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, check=False)


def check_level(level: dict[str, Any], users: int) -> None:
    prompts, answers = level["prompts"], level["answers"]
    assert prompts["kept_share"] == 0.0, "a random prompt was served from what was kept"
    assert answers["kept_share"] > 0.9
    for turn in (prompts, answers):
        assert turn["tokens"] == users * TOKENS * ROUNDS
        assert turn["tokens_per_second"] * turn["wall_seconds"] == pytest.approx(turn["tokens"])
        assert 0 < turn["ttft_p50_ms"] <= turn["ttft_max_ms"] <= turn["wall_seconds"] * 1e3
        assert 0 <= turn["tpot_p50_ms"] <= turn["tpot_p99_ms"]
    assert [stage["layers"][0] for stage in level["stages"]] == [0, level["stages"][0]["layers"][1]]
    for stage in level["stages"]:
        assert stage["compute_ms"] > 0
        assert stage["wire_ms"] >= 0
        assert stage["wait_ms"] >= 0
        assert 0 <= stage["bubble_share"] < 1


def test_bench_measures_a_cluster(client: Client) -> None:
    serve_model(client, "faq", 2)
    before = client.cluster()
    done = bench(client.address, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["prompt_tokens"], report["answer_tokens"]) == ("faq", PROMPT, TOKENS)
    assert report["prefill_tokens_per_second"] > 0
    assert [level["users"] for level in report["levels"]] == list(USERS)
    for level, users in zip(report["levels"], USERS, strict=True):
        check_level(level, users)
    one = report["levels"][0]
    token_ms = one["answers"]["wall_seconds"] * 1e3 / one["answers"]["tokens"]
    assert sum(s["compute_ms"] + s["wire_ms"] + s["wait_ms"] for s in one["stages"]) < 1.2 * token_ms
    assert [line["weight_bytes"] for line in report["roofline"]] == [s.weight_bytes for s in before.stages]
    assert [line["measured_ms"] for line in report["roofline"]] == [s["compute_ms"] for s in one["stages"]]
    after = client.cluster()
    asked = TOKENS * 2 * ROUNDS * sum(USERS)
    assert after.tokens_generated - before.tokens_generated >= asked, "figures of tokens that nobody made"
    for early, late in zip(before.stages, after.stages, strict=True):
        assert early.busy_seconds < late.busy_seconds < late.active_seconds


def test_bench_prints_tables_on_stdout_and_progress_on_stderr(client: Client) -> None:
    serve_model(client, "faq", 2)
    done = bench(client.address)
    assert done.returncode == 0, done.stderr
    for words in ("TTFT p50", "TPOT p99", "tokens/s", "of prefill", "compute", "wire", "wait", "idle", "roofline"):
        assert words in done.stdout
    assert "3 users: " in done.stderr
    assert "users: " not in done.stdout


def test_bench_refuses_what_does_not_fit_the_context(client: Client) -> None:
    serve_model(client, "faq", 2)
    room = client.cluster().max_context - 2 * TOKENS
    arguments = ["bench", "--prompt", str(room + 1), "--tokens", str(TOKENS), "--coordinator", client.address]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--prompt {room}," in done.stderr
    assert "Traceback" not in done.stderr
