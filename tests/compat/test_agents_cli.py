"""Real coding agents from npm: a tool loop and a resumed message, as ``macpipe launch`` sets them up and by hand.

MACPIPE_AGENTS names a folder in which ``npm install @anthropic-ai/claude-code @openai/codex opencode-ai
@qwen-code/qwen-code node`` ran (Qwen Code needs the newer Node of the last one).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.launch import LEAST_CONTEXT
from cluster.client import Client
from compat.by_hand import lines_by_hand
from compat.calling_model import make_calling
from compat.conftest import Served
from integration.daemons import serve_model

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(1500), pytest.mark.long]

PROMPT_S = 600
"""Guards against a hang only: a first prompt takes minutes on busy cores."""
ROOT = Path(__file__).parents[2]
COMMAND = "echo ran >> ran.txt"


@dataclass(frozen=True)
class Agent:
    """``arguments`` are those of a message, ``resumed`` those of the next one."""

    tool: str
    call: dict[str, Any]
    arguments: Sequence[str]
    resumed: Sequence[str]


CODEX = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Do it.")
CLAUDE = ("--dangerously-skip-permissions", "-p", "Do it.")
QWEN = ("--yolo", "-p", "Do it.")
AGENTS = {
    "claude": Agent("Bash", {"command": COMMAND}, CLAUDE, ("--continue", *CLAUDE)),
    "codex": Agent("exec_command", {"cmd": COMMAND}, ("exec", *CODEX), ("exec", "resume", "--last", *CODEX)),
    "opencode": Agent("bash", {"command": COMMAND, "description": "Do it"}, ("run", "Do it."), ("run", "-c", "Do it.")),
    "qwen": Agent("run_shell_command", {"command": COMMAND, "is_background": False}, QWEN, ("-c", *QWEN)),
}


def write_by_hand(name: str, served: Served) -> Sequence[str]:
    """Return the command of an agent as CLIENTS.md starts it, for this coordinator, key and context."""
    lines = lines_by_hand(name).replace("http://localhost:8080", served.http)
    lines = lines.replace("65536", str(LEAST_CONTEXT[name]))
    lines = re.sub(r"(KEY=|TOKEN=|\"apiKey\": \")none", rf"\g<1>{served.key}", lines)
    return "bash", "-c", f'{lines} "$@"', name


def _binaries(name: str) -> str:
    """Return the PATH on which the agent is. Skip the test if it is not installed."""
    folder = os.environ.get("MACPIPE_AGENTS", "")
    if not folder:
        pytest.skip("MACPIPE_AGENTS names no folder with agents")
    modules = Path(folder).resolve() / "node_modules"
    if not (modules / ".bin" / name).exists():
        pytest.skip(f"{name} is not installed in {folder}")
    return f"{modules / 'node' / 'bin'}:{modules / '.bin'}:/usr/bin:/bin"


@pytest.mark.parametrize("launched", [True, False], ids=["launch", "by hand"])
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_runs_a_tool_and_goes_on(
    name: str, launched: bool, served: Served, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    agent, path = AGENTS[name], _binaries(name)
    model = make_calling(tmp_path / f"loop-{name}", agent.tool, agent.call)
    with Client(served.grpc, timeout_s=60) as client:
        serve_model(client, model, 2, max_context=LEAST_CONTEXT[name])
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    subprocess.run(["git", "init", "-q", work], check=True)
    clean = {"HOME": str(home), "PATH": path, "TERM": "dumb", "IS_SANDBOX": "1"}

    def run(command: Sequence[str], environment: dict[str, str]) -> str:
        done = subprocess.run(
            command, cwd=work, env={**clean, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PROMPT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    key = {} if served.key == "none" else {"MACPIPE_API_KEY": served.key}
    environment = {"PYTHONPATH": str(ROOT), "MACPIPE_HTTP": served.http.removeprefix("http://"), **key}
    launch = (sys.executable, "-m", "cluster", "launch", name, "--")
    command = launch if launched else write_by_hand(name, served)
    version = run((name, "--version"), {}).strip()
    record_property("version", version)
    print(f"{name} {version}")
    for times, arguments in enumerate((agent.arguments, agent.resumed), 1):
        assert "OK." in run((*command, *arguments), environment if launched else {})
        assert (work / "ran.txt").read_text() == "ran\n" * times
