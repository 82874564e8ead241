"""Commands from the outside: a process, its streams and its exit code. What is refused at once needs no process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperOption
from typer.main import get_command

from client.scripted import Coordinator, answer_of, cluster_reply, finish_event, prompt_event
from cluster import __version__
from cluster.__main__ import __file__ as main_file
from cluster.cli.main import app
from cluster.core import errors
from cluster.core.limits import DEFAULT_MAX_TOKENS
from cluster.core.request import SamplingParams
from cluster.v1 import cluster_pb2, inference_pb2

Macpipe = Any
ANSWER = "Macs pass layers on.\n"
COMMANDS = [
    "demo",
    "init",
    "join",
    "worker",
    "plan",
    "serve",
    "generate",
    "chat",
    "embed",
    "status",
    "ps",
    "top",
    "trace",
    "load",
    "unload",
    "drain",
    "handover",
    "bench",
    "doctor",
    "report",
    "token",
    "members",
    "remove",
    "key",
    "launch",
    "service",
    "config",
]
HEAVY = ("mlx", "transformers", "numpy", "zeroconf", "grpc", "google.protobuf")


def test_help_is_light(environment: dict[str, str]) -> None:
    code = f"""
import sys
from cluster.cli.main import main
try:
    main(["--help"])
except SystemExit as done:
    assert done.code == 0
sys.stderr.write(str([name for name in {HEAVY} if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == "[]"
    assert [command for command in COMMANDS if f"\n  {command} " in done.stdout] == COMMANDS
    assert not [line for line in done.stdout.splitlines() if line.endswith("...") and "ARGS" not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(macpipe_here: Macpipe, command: str) -> None:
    done = macpipe_here(command, "-h")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: macpipe {command} ")
    assert "exit-with" not in done.stdout


def visible_options() -> Iterator[tuple[str, Any]]:
    """Each option that a command's help shows, with the command."""
    pending = [("macpipe", get_command(app))]
    while pending:
        name, command = pending.pop()
        pending += [(f"{name} {below}", one) for below, one in getattr(command, "commands", {}).items()]
        yield from ((name, one) for one in command.params if isinstance(one, TyperOption) and not one.hidden)


def test_options_have_help_and_values_have_names() -> None:
    options = [(command, one) for command, one in visible_options() if "completion" not in one.name]
    assert len(options) > 100
    for command, one in options:
        assert one.help, (command, one.name)
        assert one.is_flag or one.metavar or one.type_descriptor.is_choice, (command, one.name)


def test_the_same_option_has_the_same_form_everywhere() -> None:
    options = list(visible_options())
    clusters = [(one.metavar, one.help, one.envvar) for _, one in options if one.name == "cluster"]
    assert set(clusters) == {("NAME", "The cluster's name on this Mac.", "MACPIPE_CLUSTER")}
    contexts = {one.help for _, one in options if "--max-context" in one.opts}
    assert contexts == {"Reserve memory for this many tokens of prompt and answer."}
    homes = [(one.metavar, one.help) for _, one in options if one.name == "home"]
    assert len(homes) > 10
    assert set(homes) == {("FOLDER", "The state folder; else MACPIPE_HOME, else the default.")}


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_shows_defaults_that_the_coordinator_has(macpipe_here: Macpipe, command: str) -> None:
    shown = " ".join(macpipe_here(command, "--help").stdout.split())
    assert f"[default: {DEFAULT_MAX_TOKENS}, or what fits]" in shown
    assert f"[default: {SamplingParams().temperature:g}; 0 to 2]" in shown


def test_version(macpipe: Macpipe) -> None:
    done = macpipe("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"macpipe {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "-p", "x", "--temprature", "1"], ["--temprature", "--temperature"]),
        (["statsu"], ["statsu", "status"]),
        (["generate", "-p", "x", "--max-tokens", "many"], ["--max-tokens", "whole number"]),
        (["generate", "-p", "x", "--seed", "-1"], ["--seed"]),
        (["generate"], ["-p TEXT", "--file"]),
        (["generate", "-p", "x", "--file", __file__], ["-p TEXT", "--file"]),
        (["generate", "--file", "no such file"], ["no such file"]),
        (["generate", "-p", "x", "--raw", "--system", "y"], ["--system", "--raw"]),
        (["generate", "-p", "x", "--logprobs", "2"], ["--logprobs", "--json"]),
        (["generate", "-p", "x", "--trace"], ["--trace", "--json"]),
        (["generate", "-p", "x", "--logit-bias", "5"], ["--logit-bias", "TOKEN=BIAS"]),
        (["generate", "-p", "x", "--coordinator", "http://mac:1"], ["http://mac:1", "host:port"]),
        (["chat", "--json"], ["--message"]),
        (["chat", "--temperature", "-1"], ["--temperature", "0"]),
        (["generate", "-p", "x", "--repetition-penalty", "11"], ["--repetition-penalty", "10"]),
        (["pull", "no-such-model"], ["no-such-model", "is not a Hugging Face id; give OWNER/NAME"]),
        (["load", "faq", "--layers", "0-3,5-7"], ["--layers", "5-7", "layer 4"]),
        (["load", "faq", "--route", "pigeon"], ["pigeon", "direct", "relay"]),
        (["load"], ["MODEL"]),
        (["worker", "--port", "70000"], ["--port"]),
        (["worker", "--memory-limit", "lots"], ["--memory-limit", "lots", "24GiB"]),
        (["demo", "--workers", "9"], ["--workers"]),
        (["bench", "--users", "1,two"], ["--users", "1,two", "1,2,4"]),
        (["bench", "--users", "0,1"], ["--users", "from 1 to"]),
        (["bench", "--tokens", "1"], ["--tokens"]),
        (["bench", "--prompt", "3"], ["--prompt"]),
        (["bench", "--rounds", "0"], ["--rounds"]),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_right(macpipe_here: Macpipe, arguments: list[str], words: list[str]) -> None:
    done = macpipe_here(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [line.split() for line in ("status", "ps", "generate -p x", "chat", "chat -m x", "load faq", "unload", "bench")],
    ids=lambda arguments: arguments[0],
)
def test_without_a_coordinator_a_sentence_says_what_to_do(macpipe: Macpipe, arguments: list[str]) -> None:
    done = macpipe(*arguments, "--coordinator", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("macpipe: no coordinator answers at 127.0.0.1:1 (Connection refused)")
    assert "macpipe serve MODEL" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_is_json_where_json_was_asked_for(macpipe: Macpipe, coordinator: Coordinator) -> None:
    coordinator.script.refusal = errors.Busy("256 requests wait", retry_after_s=2.0, queued="256")
    for arguments in (["status"], ["ps"], ["generate", "-p", "x"], ["chat", "-m", "x"], ["load", "faq"]):
        done = macpipe(*arguments, "--json", to=coordinator)
        assert done.returncode == 1
        assert json.loads(done.stdout) == {
            "error": {
                "reason": "BUSY",
                "message": "256 requests wait",
                "details": {"queued": "256"},
                "retry_after_s": 2.0,
            }
        }
        assert done.stderr == ""


def test_generate_prints_the_answer_and_nothing_else(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("generate", "-p", "Why?", "--system", "Be short.", to=coordinator)
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER, "")
    (request,) = coordinator.script.seen
    assert isinstance(request, inference_pb2.ChatRequest)
    assert [(one.role, one.content) for one in request.messages] == [("system", "Be short."), ("user", "Why?")]


def test_generate_sends_every_option(macpipe: Macpipe, coordinator: Coordinator) -> None:
    sampled = "--temperature 0.5 --top-p 0.25 --top-k 40 --min-p 0.125 --repetition-penalty 1.5 --presence-penalty 1"
    others = "--frequency-penalty -1 --seed 11 --stop a --stop b --ignore-eos --max-tokens 9 --logit-bias 5=-2"
    rest = "--logit-bias 6=1.5 --model faq --raw --json --logprobs 2 --timeout 30"
    options = f"{sampled} {others} {rest}".split()
    assert macpipe("generate", "-p", "x", *options, to=coordinator).returncode == 0
    (request,) = coordinator.script.seen
    sampling = request.sampling
    assert (request.text, request.model, request.stop.max_tokens) == ("x", "faq", 9)
    assert (list(request.stop.stop), request.stop.ignore_eos) == (["a", "b"], True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 40, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 1, -1)
    assert (sampling.seed, sampling.logprobs, sampling.top_logprobs) == (11, True, 2)
    assert dict(sampling.logit_bias) == {5: -2.0, 6: 1.5}


def test_generate_reads_files_and_standard_input(macpipe: Macpipe, coordinator: Coordinator, tmp_path: Any) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Wörter\n", encoding="utf-8")
    assert macpipe("generate", "--raw", "-f", str(file), to=coordinator).stdout == ANSWER
    assert macpipe("generate", "--raw", "-p", "-", to=coordinator, stdin="von hier").stdout == ANSWER
    assert [request.text for request in coordinator.script.seen] == ["Wörter\n", "von hier"]


def test_generate_json_has_the_promised_shape(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("generate", "-p", "Why?", "--json", to=coordinator)
    facts = json.loads(done.stdout)
    assert facts == {
        "text": ANSWER.rstrip("\n"),
        "tokens": [100, 101, 102, 103, 104],
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 5,
            "cached_tokens": 1,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "timings": {"ttft_ms": 12.5, "tpot_ms": 2.5, "tokens_per_second": 400.0},
        "stages": [
            {"worker": "mac-a", "layers": [0, 4], "compute_ms": 8.5, "wire_ms": 0.5, "wait_ms": 0.25},
            {"worker": "mac-b", "layers": [4, 8], "compute_ms": 8.5, "wire_ms": 0.5, "wait_ms": 0.25},
        ],
        "seed": 7,
        "request_id": coordinator.script.seen[0].request_id,
        "model": "faq",
    }
    assert done.stdout.count("\n") == 1


def test_generate_traces_each_token(macpipe: Macpipe, coordinator: Coordinator) -> None:
    told = inference_pb2.StageFigures(worker="mac-a", end_layer=4, compute_ms=2.5, wire_ms=0.5, wait_ms=0.25)

    async def answer(request: Any, context: Any) -> Any:
        for event in answer_of(request):
            if event.HasField("token") and request.stage_timings:
                event.token.stages.append(told)
                event.token.guess = "ngram"
            yield event

    coordinator.script.answer = answer
    facts = json.loads(macpipe("generate", "-p", "Why?", "--json", "--trace", to=coordinator).stdout)
    stage = {"worker": "mac-a", "layers": [0, 4], "compute_ms": 2.5, "wire_ms": 0.5, "wait_ms": 0.25}
    assert facts["trace"] == [{"token": token, "guess": "ngram", "stages": [stage]} for token in facts["tokens"]]
    assert "trace" not in json.loads(macpipe("generate", "-p", "Why?", "--json", to=coordinator).stdout)


def test_figures_are_on_stderr_if_asked_for(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("generate", "-p", "Why?", "-v", to=coordinator)
    assert done.stdout == ANSWER
    assert "5 tokens" in done.stderr


def test_an_error_in_mid_answer_follows_the_text_on_a_line_of_its_own(
    macpipe: Macpipe, coordinator: Coordinator
) -> None:
    async def answer(request: Any, context: Any) -> Any:
        for event in answer_of(request)[:3]:
            yield event
        coordinator.script.refusal = errors.WorkerLost("mac-b stopped answering")
        await coordinator.script._meet(request, context)

    coordinator.script.answer = answer
    done = macpipe("generate", "-p", "Why?", to=coordinator)
    assert (done.returncode, done.stdout, done.stderr) == (1, "Macs\n", "macpipe: mac-b stopped answering\n")


def test_an_empty_answer_prints_nothing(macpipe: Macpipe, coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> Any:
        yield prompt_event(inference_pb2.ChatResponse)
        yield finish_event(0, kind=inference_pb2.ChatResponse)

    coordinator.script.answer = answer
    done = macpipe("generate", "-p", "Why?", to=coordinator)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_ascii_terminal_is_no_reason_to_fail(macpipe: Macpipe, coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> Any:
        for event in answer_of(request, ("Gr", "ün"), ""):
            yield event

    coordinator.script.answer = answer
    done = macpipe("generate", "-p", "Why?", to=coordinator, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "Gr?n\n")


def test_a_reader_that_goes_away_is_no_story(environment: dict[str, str], coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> Any:
        for event in answer_of(request, tuple(f"line {i}\n" for i in range(30_000))):
            yield event

    coordinator.script.answer = answer
    line = f"'{sys.executable}' -m cluster generate -p x | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        env=environment | {"MACPIPE_COORDINATOR": coordinator.address},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("line 0\n", "")


def test_status_shows_everybody(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("status", to=coordinator)
    assert done.returncode == 0
    for words in (
        "serving faq",
        "mac-a",
        "Apple M4 Max",
        "0-3",
        "20 of 48 GiB",
        "no answer for 3 s",
        "reachable",
    ):
        assert words in done.stdout
    assert done.stderr == ""


def test_status_warns_of_what_does_not_work_as_asked_for(macpipe: Macpipe, coordinator: Coordinator) -> None:
    coordinator.script.cluster = cluster_reply(warnings=["the journal is off"])
    assert "\nwarning: the journal is off\n" in macpipe("status", to=coordinator).stdout
    assert json.loads(macpipe("status", "--json", to=coordinator).stdout)["warnings"] == ["the journal is off"]


def test_status_knows_no_memory_of_who_is_gone(macpipe: Macpipe, coordinator: Coordinator) -> None:
    rows = macpipe("status", to=coordinator).stdout.splitlines()
    there, gone = (next(row for row in rows if row.startswith(name)) for name in ("mac-a", "mac-b"))
    assert "20 of 48 GiB" in there
    assert "unreachable" in gone
    assert "48 GiB" not in gone


def test_a_worker_takes_an_address_or_an_interface(macpipe: Macpipe) -> None:
    done = macpipe("worker", "--interface", "lo", "--host", "127.0.0.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give --host or --interface, not both" in done.stderr


def test_status_of_an_idle_cluster_says_what_to_do(macpipe: Macpipe, coordinator: Coordinator) -> None:
    coordinator.script.cluster = cluster_pb2.GetClusterResponse(
        cluster="default", state=cluster_pb2.SERVING_STATE_FAILED, problem="mac-b stopped answering"
    )
    done = macpipe("status", to=coordinator)
    assert "failed" in done.stdout
    assert "mac-b stopped answering" in done.stdout
    assert "macpipe worker" in done.stdout


def test_status_json_has_every_field(macpipe: Macpipe, coordinator: Coordinator) -> None:
    facts = json.loads(macpipe("status", "--json", to=coordinator).stdout)
    sent = {field.name for field in cluster_pb2.GetClusterResponse.DESCRIPTOR.fields}
    assert facts.keys() == sent
    assert facts["state"] == "serving"
    assert facts["workers"][1]["problem"] == "no answer for 3 s"
    assert facts["stages"][1]["layers"] == [4, 8]
    assert facts["workers"][0].keys() == {field.name for field in cluster_pb2.Worker.DESCRIPTOR.fields}


def test_a_pipe_gets_one_snapshot_of_what_is_watched(macpipe: Macpipe, coordinator: Coordinator) -> None:
    assert macpipe("status", "--watch", to=coordinator).stdout == macpipe("status", to=coordinator).stdout
    shown = macpipe("top", to=coordinator).stdout
    assert all(part in shown for part in ("- tokens/s", "mac-a", "r1", "1 answering, 1 queued"))
    assert "q quit" not in shown
    assert "\x1b" not in shown
    facts = json.loads(macpipe("top", "--json", to=coordinator).stdout)
    assert (facts["tokens_per_second"], facts["cluster"]["model"]) == (None, "faq")


def test_ps(macpipe: Macpipe, coordinator: Coordinator) -> None:
    shown = macpipe("ps", to=coordinator).stdout
    assert "queued" in shown
    assert "0 of 9" in shown
    facts = json.loads(macpipe("ps", "--json", to=coordinator).stdout)
    assert [(one["request_id"], one["lane"]) for one in facts["requests"]] == [("r1", 1), ("r2", None)]
    assert {one["model"] for one in (*facts["requests"], *facts["stages"])} == {"faq"}
    assert facts["models"] == [{"name": "faq", "state": "serving", "lanes": [], "queued": 1, "prefixes": 0}]
    del coordinator.script.cluster.requests[:]
    lines = macpipe("ps", to=coordinator).stdout.splitlines()
    assert lines[0] == "no live requests"
    assert any(line.startswith("0      mac-a") for line in lines)


def test_load_tells_its_progress_in_lines(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("load", "faq", "--workers", "2", "--layers", "0-3,4-7", "--route", "relay", to=coordinator)
    assert done.stdout == "serving faq on 2 workers: mac-a 0-3, mac-b 4-7\n"
    assert "mac-a layers 0-3" in done.stderr
    assert "50% of 100 B" in done.stderr
    (request,) = coordinator.script.seen
    assert (request.workers, request.layers, request.route) == (2, "0-3,4-7", cluster_pb2.ROUTE_RELAY)
    assert json.loads(macpipe("load", "faq", "--json", to=coordinator).stdout)["model"] == "faq"


def test_unload(macpipe: Macpipe, coordinator: Coordinator) -> None:
    assert macpipe("unload", to=coordinator).stdout == "unloaded faq\n"
    assert json.loads(macpipe("unload", "--json", to=coordinator).stdout) == {"unloaded": "faq"}
    assert json.loads(macpipe("unload", "--all", "--json", to=coordinator).stdout) == {"unloaded": ["faq"]}


def test_chat_from_a_pipe_remembers(macpipe: Macpipe, coordinator: Coordinator) -> None:
    lines = "Why?\n\n/system Be short.\nHow?\nWhen?\n/stats\n/what\n/quit\nnever\n"
    done = macpipe("chat", to=coordinator, stdin=lines)
    assert (done.returncode, done.stdout) == (0, ANSWER * 3)
    assert "5 tokens" in done.stderr
    assert "no command /what" in done.stderr
    asked = [one for one in coordinator.script.seen if isinstance(one, inference_pb2.ChatRequest)]
    assert [[(m.role, m.content) for m in one.messages] for one in asked] == [
        [("user", "Why?")],
        [("system", "Be short."), ("user", "How?")],
        [("system", "Be short."), ("user", "How?"), ("assistant", ANSWER.strip()), ("user", "When?")],
    ]


def test_a_chat_without_a_line_says_that_nothing_was_sent(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("chat", to=coordinator)
    assert (done.returncode, done.stdout) == (0, "")
    assert "standard input has no line, so nothing was sent" in done.stderr


def test_chat_with_one_message(macpipe: Macpipe, coordinator: Coordinator) -> None:
    assert macpipe("chat", "-m", "Why?", to=coordinator).stdout == ANSWER
    assert json.loads(macpipe("chat", "-m", "Why?", "--json", to=coordinator).stdout)["text"] == ANSWER.strip()


def test_an_answer_of_a_fallback_says_so_on_stderr(macpipe: Macpipe, coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> Any:
        for event in answer_of(request):
            if event.HasField("prompt") and len(coordinator.script.seen) != 3:
                event.prompt.model = event.prompt.fallback = "small"
            yield event

    coordinator.script.answer = answer
    told = "(answered by small, the fallback: big cannot be served now)\n"
    plain = macpipe("generate", "-p", "Why?", "--model", "big", to=coordinator)
    assert (plain.stdout, plain.stderr) == (ANSWER, told)
    in_json = macpipe("chat", "-m", "Why?", "--model", "big", "--json", to=coordinator)
    assert (json.loads(in_json.stdout)["model"], in_json.stderr) == ("small", told)
    assert macpipe("generate", "-p", "Why?", to=coordinator).stderr == "", "the third one is the model's own"
    chatted = macpipe("chat", to=coordinator, stdin="Why?\nHow?\n")
    assert chatted.stdout == ANSWER * 2
    assert chatted.stderr == "(answered by small, the fallback: the default model cannot be served now)\n", "once"


def test_embed_prints_a_vector_for_each_text_or_piped_line(macpipe: Macpipe, coordinator: Coordinator) -> None:
    done = macpipe("embed", "a", "two words", "--model", "e", "--dimensions", "2", to=coordinator)
    assert json.loads(done.stdout) == {"model": "e", "vectors": [[1.0, 0.5], [9.0, 0.5]], "prompt_tokens": 10}
    piped = macpipe("embed", to=coordinator, stdin="Why?\n\nHow come?\n")
    assert json.loads(piped.stdout)["vectors"] == [[4.0, 0.5], [9.0, 0.5]]
    first = coordinator.script.seen[0]
    assert (first.model, first.dimensions) == ("e", 2)
    empty = macpipe("embed", to=coordinator, stdin="\n")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "there is no text; name some, or pipe in a text a line" in empty.stderr


def test_chat_needs_a_model(macpipe: Macpipe, coordinator: Coordinator) -> None:
    coordinator.script.cluster = cluster_reply(cluster_pb2.SERVING_STATE_IDLE, model="")
    done = macpipe("chat", to=coordinator, stdin="Why?\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "serves no model" in done.stderr


def test_the_unexpected_has_a_sentence_and_a_way_to_more(
    macpipe: Macpipe, coordinator: Coordinator, tmp_path: Any
) -> None:
    module = "import cluster.client.client as c\ndef broken(*a): raise KeyError('oops')\nc.Client.cluster = broken\n"
    (tmp_path / "sitecustomize.py").write_text(module, encoding="utf-8")
    path = f"{tmp_path}:."
    done = macpipe("status", to=coordinator, PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "macpipe: unexpected error: KeyError: 'oops'; set MACPIPE_DEBUG=1 for the traceback\n"
    assert "Traceback" in macpipe("status", to=coordinator, PYTHONPATH=path, MACPIPE_DEBUG="1").stderr


def test_an_old_python_gets_one_line(environment: dict[str, str]) -> None:
    old = "sys.version_info = (3, 10, 13, 'final', 0)"
    code = f"import runpy, sys; {old}; runpy.run_module('cluster', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("macpipe: needs Python 3.11 or newer, and this is 3.10; run ")
    assert run.stderr.count("\n") == 1
    source = Path(main_file).read_text(encoding="utf-8")
    assert ast.parse(source, feature_version=(3, 8)), "an old Python reads the file before it runs it"
