"""Measures the turns of coding agents: replays sessions on macpipe and `mlx_lm.server`, alternately in one run.

macpipe runs two workers on loopback, mlx-lm one process; both serve the same model. Sessions are recordings
(``--sessions``) and three generated ones:

- ``tools``: an agent calls tools, and their results grow until the prompt has ``--tokens``. Its answers are not the
  model's own: each call is rendered again, and a new task drops the earlier thinking.
- ``short``: a prompt of ``--at`` tokens, then turns that add a short call and its result.
- ``chat``: each prompt has the model's own answers.
- ``agents``: sub-agents whose prompts begin with the same ``--shared`` tokens start at once, and take two more turns.

The reusable part of a prompt is the longest prefix that it shares with any earlier prompt or answer; its last token is
always computed. A turn is warm if at least half of its prompt is reusable. The ratios:

- ``cached_over_reusable``: tokens that warm turns took from the cache, over the reusable ones.
- ``warm_over_cold``: time to the first token of the later turns of ``short``, over that of its first turn.
- ``ssd_over_cold``: time to the first token of that first turn, sent again after a restart of coordinator and workers,
  which have it on disk, over the same without.
- ``over_mlx_lm``: the same time of macpipe over mlx-lm's, as the median of all warm turns.
- ``read_over_once``: tokens computed for the prompts of ``agents``, over the distinct ones.

Each round has different prompts: the first line of the first text differs.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from agent_client import Answer, Refused, as_chat, send
from agent_models import MODELS, make_agent_model
from agent_sessions import Ask, Prompts, Script, recorded
from figures import Figure, options, print_figures
from loopback import start_cluster
from mlx_server import MlxServer, mlx_server

from cluster.cli.process_group import SignalExit, reserve_port
from cluster.core.errors import InvalidRequest
from cluster.model.tokenizer import Tokenizer, load_tokenizer

ANSWER_TOKENS = 8
ROOM = 4096
"""Tokens of context beyond the longest prompt."""
SHORT_TURNS = 3
AGENT_TURNS = 3
DISK = ("--prefix-disk", "16GiB")
REFUSALS = (Refused, InvalidRequest, ValueError)
"""What macpipe's answer, forms and templates raise for an unsupported request."""
WARM_SHARE = 0.5
"""A turn is warm if at least this share of its prompt is reusable."""


@dataclass(frozen=True)
class Turn:
    """One request on both servers. Times are in milliseconds. ``refused`` says why there are none."""

    session: str
    number: int
    prompt: int = 0
    reusable: int = 0
    cached: int = 0
    ttft_ms: float = 0.0
    mlx_prompt: int = 0
    mlx_cached: int = 0
    mlx_ttft_ms: float = 0.0
    refused: str = ""

    @property
    def warm(self) -> bool:
        return self.reusable >= WARM_SHARE * self.prompt > 0

    def line(self) -> str:
        """Return the turn as a row of the table for people."""
        if self.refused:
            return f"{self.session:24} {self.number:4} refused: {' '.join(self.refused.split())[:200]}"
        share = self.cached / self.prompt
        over = f"{self.cached / self.reusable:9.3f}" if self.reusable else "        -"
        theirs = self.mlx_cached / max(1, self.mlx_prompt)
        return (
            f"{self.session:24} {self.number:4} {self.prompt:8} {share:8.1%} {self.reusable:9} {over} "
            f"{self.ttft_ms:9.0f} {theirs:8.1%} {self.mlx_ttft_ms:9.0f}"
        )


HEADER = (
    f"{'session':24} {'turn':>4} {'prompt':>8} {'cached':>8} {'reusable':>9} {'of it':>9} "
    f"{'TTFT ms':>9} {'mlx-lm':>8} {'TTFT ms':>9}"
)

OVER = {
    "warm_over_cold": ("short_warm", "short_cold"),
    "ssd_over_cold": ("restarted", "short_cold"),
    "cold_over_mlx_lm": ("short_cold", "mlx_short_cold"),
}


@dataclass
class Report:
    """The measurements of one model."""

    turns: list[Turn] = field(default_factory=list)
    agents: list[Turn] = field(default_factory=list)
    restarted: list[Turn] = field(default_factory=list)

    def _warm(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.warm]

    def _short(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.session == "short" and not turn.refused]

    def figures(self, model: str) -> list[Figure]:
        warm, short = self._warm(), self._short()
        found = {
            "warm": [t.ttft_ms for t in warm],
            "mlx_warm": [t.mlx_ttft_ms for t in warm],
            "short_cold": [t.ttft_ms for t in short if not t.warm],
            "short_warm": [t.ttft_ms for t in short if t.warm],
            "mlx_short_cold": [t.mlx_ttft_ms for t in short if not t.warm],
            "mlx_short_warm": [t.mlx_ttft_ms for t in short if t.warm],
            "restarted": [t.ttft_ms for t in self.restarted if not t.refused],
            "agents": [t.ttft_ms for t in self.agents if not t.refused],
            "mlx_agents": [t.mlx_ttft_ms for t in self.agents if not t.refused],
        }
        return [Figure(f"{model}{name}", "ms", values) for name, values in found.items() if values]

    def ratios(self, model: str) -> dict[str, float]:
        warm = self._warm()
        times = {figure.name: figure.median for figure in self.figures("")}
        found: dict[str, float] = {}
        if warm:
            reusable = sum(t.reusable for t in warm)
            found["cached_over_reusable"] = sum(t.cached for t in warm) / reusable
            found["mlx_cached_over_reusable"] = sum(t.mlx_cached for t in warm) / reusable
            found["cached_share"] = sum(t.cached for t in warm) / sum(t.prompt for t in warm)
            found["over_mlx_lm"] = median(t.ttft_ms / t.mlx_ttft_ms for t in warm)
        for over, (above, below) in OVER.items():
            if above in times and below in times:
                found[over] = times[above] / times[below]
        if self.agents and not any(t.refused for t in self.agents):
            once = sum(t.prompt - t.reusable for t in self.agents)
            found["read_over_once"] = sum(t.prompt - t.cached for t in self.agents) / once
            found["mlx_read_over_once"] = sum(t.mlx_prompt - t.mlx_cached for t in self.agents) / once
        found["refused"] = sum(bool(t.refused) for t in (*self.turns, *self.agents))
        return {f"{model}{name}": value for name, value in found.items()}


class Replay:
    """Sends sessions to both servers of one model and records the cost of each turn."""

    def __init__(self, port: int, theirs: MlxServer, tokenizer: Tokenizer, quiet: bool) -> None:
        self._port, self._theirs, self._tokenizer, self._quiet = port, theirs, tokenizer, quiet
        self._prompts = Prompts()
        self.report = Report()
        self.last_text = ""
        self._short: list[Ask] = []

    def session(self, name: str, asks: Iterable[Ask], salt: str) -> None:
        """Replay a session turn by turn. ``last_text`` is macpipe's latest answer."""
        for number, ask in enumerate(asks):
            prepared = ask.prepared(salt, ANSWER_TOKENS)
            self._note(self.report.turns, self._turn(name, number, prepared))
            if name == "short" and not number:
                self._short.append(prepared)

    def after_restart(self) -> None:
        """Send the first turn of each ``short`` session to macpipe again, which has been restarted."""
        for number, ask in enumerate(self._short):
            try:
                own = send(self._port, ask)
            except REFUSALS as error:
                self._note(self.report.restarted, Turn("restarted", number, refused=str(error)))
                continue
            turn = Turn(
                "restarted", number, own.prompt_tokens, own.prompt_tokens - 1, own.cached_tokens, own.ttft_s * 1e3
            )
            self._note(self.report.restarted, turn)

    def at_once(self, asks: Sequence[Ask], salt: str) -> None:
        """Send all requests at once: first to macpipe, then to mlx-lm."""
        prepared = [ask.prepared(salt, ANSWER_TOKENS) for ask in asks]
        counts, chats = [], []
        try:
            for ask in prepared:
                conversation = ask.conversation()
                ids = self._tokenizer.chat(conversation.messages, conversation.options)
                counts.append((len(ids), self._prompts.reusable(ids)))
                self._prompts.add(ids)
                chats.append(as_chat(ask, conversation))
            own = self._send_all(self._port, prepared)
        except REFUSALS as error:
            self._note(self.report.agents, Turn("agents", 0, refused=str(error)))
            return
        theirs = self._send_all(self._theirs.port, chats)
        for number, (count, ours, mlx) in enumerate(zip(counts, own, theirs, strict=True)):
            self._note(self.report.agents, _turn("agents", number, count, ours, mlx))

    def _send_all(self, port: int, asks: Sequence[Ask]) -> list[Answer]:
        with ThreadPoolExecutor(len(asks)) as pool:
            return list(pool.map(lambda ask: send(port, ask), asks))

    def _turn(self, name: str, number: int, ask: Ask) -> Turn:
        try:
            conversation = ask.conversation()
            ids = self._tokenizer.chat(conversation.messages, conversation.options)
            own = send(self._port, ask)
        except REFUSALS as error:
            return Turn(name, number, refused=str(error))
        if own.prompt_tokens != len(ids):
            raise SystemExit(f"{name}, turn {number}: macpipe reads {own.prompt_tokens} tokens, the bench {len(ids)}")
        theirs = send(self._theirs.port, as_chat(ask, conversation))
        count = len(ids), self._prompts.reusable(ids)
        self._prompts.add((*ids, *self._answer_ids(own)))
        self.last_text = own.text
        return _turn(name, number, count, own, theirs)

    def _answer_ids(self, answer: Answer) -> tuple[int, ...]:
        """Return the tokens of an answer's text if the model generated as many, else an empty sequence."""
        for text in (f" {answer.text}", answer.text):
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == answer.answer_tokens:
                return ids
        return ()

    def _note(self, turns: list[Turn], turn: Turn) -> None:
        turns.append(turn)
        print(turn.line(), file=sys.stderr if self._quiet else sys.stdout, flush=True)


def _turn(name: str, number: int, count: tuple[int, int], own: Answer, theirs: Answer) -> Turn:
    """Return the row of one request. ``count`` has the prompt's tokens, and how many of them are reusable."""
    return Turn(
        name,
        number,
        *count,
        own.cached_tokens,
        own.ttft_s * 1e3,
        theirs.prompt_tokens,
        theirs.cached_tokens,
        theirs.ttft_s * 1e3,
    )


@dataclass(frozen=True)
class Plan:
    """What to replay with each model."""

    sessions: dict[str, list[Ask]]
    tokens: int
    at: int
    agents: int
    shared: int
    rounds: int


def replay_all(replay: Replay, script: Script, plan: Plan) -> None:
    """Replay everything, each round with another salt."""
    for number in range(plan.rounds):
        salt = f"Run {number}.\n"
        for name, asks in plan.sessions.items():
            replay.session(name, asks, salt)
        if plan.tokens:
            _replay_generated(replay, script, plan, salt, number)


def _replay_generated(replay: Replay, script: Script, plan: Plan, salt: str, number: int) -> None:
    replay.session("tools", script.tool_session(), f"Tools. {salt}")
    replay.session("short", script.short_turns(plan.at, SHORT_TURNS), f"Short. {salt}")
    replay.session("chat", script.chat_session(lambda: replay.last_text), f"Chat. {salt}")
    if plan.agents:
        for asks in script.agents(plan.agents, plan.shared, AGENT_TURNS):
            replay.at_once(asks, f"Agents {number}. {salt}")


def measure(name: str, model: Path | None, plan: Plan, context: int, quiet: bool) -> Report:
    """Serve one model on both servers and replay everything."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-agents-")))
        served = folder / "model"
        if model is None:
            make_agent_model(served, name, context)
        else:
            served.symlink_to(model.resolve(), target_is_directory=True)
        tokenizer = load_tokenizer(served)
        port = stack.enter_context(reserve_port("127.0.0.1"))
        options = ("--http", f"127.0.0.1:{port}", "--max-context", str(context))
        with ExitStack() as first:
            start_cluster(first, served, *options, worker_options=DISK)
            theirs = first.enter_context(mlx_server(served, folder))
            replay = Replay(port, theirs, tokenizer, quiet)
            print(f"{name}\n{HEADER}", file=sys.stderr if quiet else sys.stdout, flush=True)
            replay_all(replay, Script(tokenizer, plan.tokens), plan)
        start_cluster(stack, served, *options, worker_options=DISK)
        replay.after_restart()
    return replay.report


def main() -> int:
    parser = options(str(__doc__))
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="types of random models")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="replay with this checkpoint instead")
    parser.add_argument("--sessions", type=Path, nargs="+", default=[], metavar="FILE", help="recordings (JSON lines)")
    parser.add_argument("--tokens", type=int, default=60000, help="of the longest generated prompt; 0: recordings only")
    parser.add_argument("--at", type=int, default=16000, help="tokens of the prompt before short turns")
    parser.add_argument("--agents", type=int, default=4, help="sub-agents that start at once; 0: none")
    parser.add_argument("--shared", type=int, default=8192, help="tokens of the sub-agents' common beginning")
    parser.add_argument("--context", type=int, default=0, help="of the server; by default enough for --tokens")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    sessions = {file.stem[:24]: recorded(file) for file in asked.sessions}
    if not sessions and not asked.tokens:
        parser.error("--tokens 0 needs --sessions")
    if asked.model and not (asked.model / "config.json").is_file():
        parser.error(f"--model {asked.model} is no folder of a model: it has no config.json")
    plan = Plan(sessions, asked.tokens, asked.at, asked.agents, asked.shared, asked.rounds)
    generated = max(asked.tokens, asked.at, asked.shared) if asked.tokens else 0
    longest = max([generated, *(len(str(a.body)) // 2 for s in sessions.values() for a in s)])
    context = asked.context or longest * 5 // 4 + ROOM
    chosen = {asked.model.name: asked.model} if asked.model else dict.fromkeys(asked.models)
    try:
        with SignalExit(signal.SIGTERM, signal.SIGHUP):
            reports = {name: measure(name, model, plan, context, asked.json) for name, model in chosen.items()}
    except Refused as refused:  # macpipe's refusals are figures
        raise SystemExit(f"mlx_lm.server answered {refused}") from None
    figures = [figure for name, report in reports.items() for figure in report.figures(f"{name}_")]
    ratios = {key: ratio for name, report in reports.items() for key, ratio in report.ratios(f"{name}_").items()}
    rows = {name: [asdict(turn) for turn in (*r.turns, *r.agents, *r.restarted)] for name, r in reports.items()}
    print_figures("medians", figures, ratios, asked.json, {"turns": rows} if asked.json else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
