"""Compares macpipe with `mlx_lm.server --pipeline`: the same model in two processes each, over HTTP, in one run.

mlx-lm's pipeline runs over MLX's ring (TCP). Each round measures of both: one user's tokens/s, eight users' tokens/s,
and the time to the first token of a long prompt. The ratios are macpipe's figure over mlx-lm's: above 1 is better for
tokens/s, below 1 for the time to the first token.

A waiting ring polls its sockets, so an idle mlx-lm takes more than half a core. Its processes are stopped while
macpipe is measured. If other programs use the cores, a token of the ring takes up to a second and a long prompt takes
minutes, because its processes wait for each other. So no further round starts after ``--seconds``.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from statistics import median

import mlx.core as mx
from figures import Figure, options, print_figures
from loopback import make_model, start_cluster
from mlx_server import NAME, MlxServer, mlx_server

from cluster.cli.process_group import SignalExit, reserve_port

TEXT = "What is a stage and why does a Mac hold layers of a model when another Mac dies and comes back"
CONTEXT = 8192
WARM = 4
"""Words of a prompt and tokens of an answer for the warm-up."""
ANSWER_S = 300
"""Time limit for the next piece of an answer, in seconds."""


@dataclass(frozen=True)
class Load:
    """One measurement: ``users`` at once, each with a prompt of ``words`` and an answer of ``tokens``."""

    name: str
    unit: str
    users: int
    words: int
    tokens: int


LOADS = (
    Load("one_user", "tok/s", 1, 8, 64),
    Load("eight_users", "tok/s", 8, 8, 48),
    Load("first_token", "s", 1, 600, 2),
)


@dataclass(frozen=True)
class Answer:
    """Seconds to the first text, and the number of pieces of text."""

    first_s: float
    pieces: int


def make_checkpoint(folder: Path, width: int, layers: int) -> Path:
    """Write a random qwen2, an architecture that mlx-lm's pipeline supports."""
    heads = width // 64
    config = {
        "model_type": "qwen2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    model = make_model(folder, config)
    names = mx.load(str(model / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def ask(port: int, model: str, prompt: str, tokens: int) -> Answer:
    """Stream one completion over a new connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    sent, first, pieces = time.perf_counter(), 0.0, 0
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"port {port} answers {reply.status}: {reply.read(2000).decode()}")
        for line in reply:
            if line.startswith(b"data: {") and any(c.get("text") for c in json.loads(line[6:])["choices"]):
                pieces += 1
                first = first or time.perf_counter() - sent
    finally:
        connection.close()
    return Answer(first, pieces)


def prompt(salt: int, words: int) -> str:
    """Return a text that shares no prefix with the text of another ``salt``, so that no cache helps."""
    known = TEXT.split()
    return f"{salt} " + " ".join(known[(i * 7 + salt * 5) % len(known)] for i in range(words))


def measure(load: Load, port: int, model: str, salt: int) -> float:
    """Return tokens/s of all users together, or the seconds to the first token."""
    prompts = [prompt(100 * salt + user, load.words) for user in range(load.users)]
    started = time.perf_counter()
    with ThreadPoolExecutor(load.users) as pool:
        answers = list(pool.map(lambda text: ask(port, model, text, load.tokens), prompts))
    if load.unit == "s":
        return max(answer.first_s for answer in answers)
    return sum(answer.pieces for answer in answers) / (time.perf_counter() - started)


class Rounds:
    """Measures both alternately, and keeps the results by load and party."""

    def __init__(self, own_port: int, theirs: MlxServer) -> None:
        self._own_port, self._theirs = own_port, theirs
        self.found: dict[tuple[str, str], list[float]] = {}

    def warm_up(self) -> None:
        """Let both answer a few tokens, because first accesses to memory are slow."""
        for load in LOADS:
            self._measure(replace(load, words=WARM, tokens=WARM), 0)

    def play(self, load: Load, number: int) -> None:
        """Measure one load on both."""
        for party, value in self._measure(load, number).items():
            print(f"round {number} {party} {load.name} {value:.3f} {load.unit}", file=sys.stderr, flush=True)
            self.found.setdefault((load.name, party), []).append(value)

    def _measure(self, load: Load, number: int) -> dict[str, float]:
        with self._theirs.paused():
            own = measure(load, self._own_port, "default", number)
        return {"macpipe": own, "mlx_lm": measure(load, self._theirs.port, NAME, number)}


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=180, help="measure nothing again after this long")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    with ExitStack() as stack:
        stack.enter_context(SignalExit(signal.SIGTERM, signal.SIGHUP))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-peer-")))
        model = make_checkpoint(folder / "model", asked.width, asked.layers)
        own_port = stack.enter_context(reserve_port("127.0.0.1"))
        start_cluster(stack, model, "--http", f"127.0.0.1:{own_port}")
        rounds = Rounds(own_port, stack.enter_context(mlx_server(model, folder, processes=2)))
        rounds.warm_up()
        began = time.monotonic()
        for number, load in product(range(1, asked.rounds + 1), LOADS):
            if number == 1 or time.monotonic() - began < asked.seconds:
                rounds.play(load, number)
    units = {load.name: load.unit for load in LOADS}
    found = rounds.found
    figures = [Figure(f"{party}_{load}", units[load], values) for (load, party), values in found.items()]
    ratios = {
        f"{load.name}_over_mlx_lm": median(found[load.name, "macpipe"]) / median(found[load.name, "mlx_lm"])
        for load in LOADS
    }
    print_figures("medians", figures, ratios, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
