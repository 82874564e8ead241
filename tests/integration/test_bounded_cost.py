"""A costly schema ends its own request with an error while others continue, and the coordinator stops at once."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.client import Client
from cluster.core.errors import InvalidGrammar, MacpipeError
from integration.daemons import START_S, Cluster, alive, children, gone

pytestmark = pytest.mark.timeout(180)

GOOD = '{"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": false}'
TICKS = os.sysconf("SC_CLK_TCK")
STOP_S = 10.0
TOKENS = 500
"""They take longer than the check of a schema may."""


def costly(factor: int) -> str:
    """A schema of 40 bytes whose compiling takes seconds."""
    return f'{{"type":"integer","multipleOf":{factor}}}'


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def test_a_costly_schema_fails_its_own_request_and_a_check_ends_with_the_coordinator(cluster: Cluster) -> None:
    cluster.worker("ada")
    serve, address = cluster.serving("faq", 1)
    with Client(address, timeout_s=60) as client, ThreadPoolExecutor(1) as thread:
        stream = iter(client.stream("What is a hop?", max_tokens=TOKENS, ignore_eos=True))
        next(stream)
        with pytest.raises(InvalidGrammar, match=r"needs more than 0\.5 s of CPU time"):
            client.generate("A number:", json_schema=costly(999_983), max_tokens=8)
        assert sum(1 for _ in stream) == TOKENS - 1
        assert client.generate("What is a hop?", max_tokens=8, json_schema=GOOD).text.startswith("{")
        assert client.generate("A number:", json_schema=costly(20_011), max_tokens=4).text
        processes = children(serve.process.pid)
        before = {pid: cpu_s(pid) for pid in processes}
        asked = thread.submit(client.generate, "A number:", json_schema=costly(1_999_993), max_tokens=8)
        deadline = time.monotonic() + START_S
        while not any(alive(pid) and cpu_s(pid) > before[pid] + 0.1 for pid in processes):
            assert time.monotonic() < deadline
        assert serve.stop(signal.SIGTERM, STOP_S) == 0
        with pytest.raises(MacpipeError):
            asked.result(10)
    assert all(gone(pid, 1.0) for pid in processes)
    assert "Traceback" not in serve.said()
