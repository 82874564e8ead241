"""Compares HTTP with the gRPC client on one cluster: time to the first token, and time between tokens.

The model is small, so that the interfaces take a large part of the time. Each round sends one request over each. The
figure that matters is the difference per token.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

from figures import Figure, options, print_figures
from loopback import make_llama, start_cluster

from cluster.cli.process_group import reserve_port
from cluster.client import Client

CONTEXT = 2048
PROMPT = list(range(5, 21))


def over_grpc(client: Client, tokens: int) -> list[float]:
    """Return the times of sending the request and of each token's arrival."""
    arrivals = [time.perf_counter()]
    for _ in client.stream(PROMPT, max_tokens=tokens, ignore_eos=True):
        arrivals.append(time.perf_counter())
    return arrivals[: tokens + 1]


def over_http(connection: HTTPConnection, tokens: int) -> list[float]:
    """Return the same times over one kept connection. Each chunk with text or a finish reason counts as a token."""
    body = {
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 0,  # so that a token that is no whole character makes a chunk, too
    }
    arrivals = [time.perf_counter()]
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    with connection.getresponse() as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
    return arrivals[: tokens + 1]


def measure(ask: dict[str, Callable[[], list[float]]], rounds: int) -> list[Figure]:
    """Measure both alternately. The first round is a warm-up and is not counted."""
    found: dict[str, list[float]] = {f"{name}_{kind}": [] for kind in ("ttft", "tpot") for name in ask}
    for number in range(rounds + 1):
        for name, one in ask.items():
            sent, first, *_, last = arrivals = one()
            if number:
                found[f"{name}_ttft"].append((first - sent) * 1e3)
                found[f"{name}_tpot"].append((last - first) / (len(arrivals) - 2) * 1e3)
    return [Figure(name, "ms", values) for name, values in found.items()]


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=100)
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-http-")))
        model = make_llama(folder / "model", hidden=64, intermediate=128, layers=4, heads=4, context=CONTEXT)
        port = stack.enter_context(reserve_port("127.0.0.1"))
        client = start_cluster(stack, model, "--http", f"127.0.0.1:{port}")
        connection = HTTPConnection("127.0.0.1", port, timeout=300)
        stack.callback(connection.close)
        ways = {
            "grpc": lambda: over_grpc(client, asked.tokens),
            "http": lambda: over_http(connection, asked.tokens),
        }
        figures = measure(ways, asked.rounds)
    by_name = {f.name: f.rounds for f in figures}
    overhead = {
        f"http_less_grpc_{kind}_ms": median(
            h - g for h, g in zip(by_name[f"http_{kind}"], by_name[f"grpc_{kind}"], strict=True)
        )
        for kind in ("ttft", "tpot")
    }
    print_figures("medians", figures, overhead, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
