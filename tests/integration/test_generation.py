"""The options of a generation, with the bundled model on two real daemons."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.client import AsyncClient, Client
from cluster.core.errors import Aborted, DeadlineExceeded, InvalidRequest, ModelNotFound, PromptTooLong, RequestNotFound
from cluster.core.limits import KIB, MIB
from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import load_tokenizer
from effort import effort
from integration.daemons import Cluster, command, serve_model

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(120)]

QUESTION = "What is macpipe?"


@pytest.fixture(autouse=True)
def faq(client: Client) -> None:
    """Two stages of the model that comes along."""
    state = client.cluster()
    if state.model != "faq" or len(state.stages) != 2:
        serve_model(client, "faq", 2)


def test_it_answers_questions_about_macpipe(client: Client) -> None:
    answer = client.chat([("user", QUESTION)], max_tokens=200)
    assert answer.finish_reason == "stop"
    assert "macpipe" in answer.text.lower()
    assert answer.text.rstrip().endswith((".", "!"))


def test_a_stream_is_the_whole_answer_in_pieces(client: Client) -> None:
    whole = client.chat([("user", QUESTION)], max_tokens=60)
    stream = client.stream_chat([("user", QUESTION)], max_tokens=60)
    events = list(stream)
    assert stream.finish is not None
    assert "".join(e.text for e in events) + stream.finish.text == whole.text
    assert tuple(e.token for e in events) == whole.tokens
    assert [e.index for e in events] == list(range(len(events)))


@pytest.mark.parametrize("samples", [1, 3])
def test_a_prompt_comes_with_its_log_probabilities(client: Client, samples: int) -> None:
    """Asked for twice: what was kept of the first one is no help to the second one's report."""
    prompt = [i * 37 % 300 + 100 for i in range(90)]
    plain = client.generate(prompt, max_tokens=5)
    both = [client.generate(prompt, max_tokens=5, samples=samples, prompt_logprobs=3) for _ in range(2)]
    for answer in both:
        assert answer.tokens == plain.tokens
        assert len(answer.choices) == samples
        assert [one.token for one in answer.prompt_logprobs] == prompt
        assert answer.prompt_logprobs[0].logprob is None
        for one in answer.prompt_logprobs[1:]:
            assert one.logprob is not None
            assert len(one.top) == 3
            assert one.logprob <= one.top[0].logprob
            assert all(top.text for top in one.top)
    assert both[0].prompt_logprobs == both[1].prompt_logprobs
    assert client.generate(prompt, max_tokens=0, prompt_logprobs=3).prompt_logprobs == both[0].prompt_logprobs
    assert client.generate(prompt, max_tokens=1).prompt_logprobs == ()


@pytest.mark.parametrize(("options", "field"), [({"prompt_logprobs": 21}, "prompt_logprobs"), ({}, "max_tokens")])
def test_log_probabilities_of_the_prompt_have_bounds(client: Client, options: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.generate([300, 301], max_tokens=0, **options)  # type: ignore[misc]
    assert refused.value.field == field
    with pytest.raises(TypeError, match="unknown option prompt_logprobs"):
        client.chat([("user", "x")], prompt_logprobs=1)  # type: ignore[call-arg]


def test_a_stop_string_cuts_across_tokens(client: Client) -> None:
    whole = client.chat([("user", QUESTION)], max_tokens=60).text
    stop = whole[10:19]
    cut = client.chat([("user", QUESTION)], max_tokens=60, stop=[stop])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_log_probabilities_rank_the_chosen_token_first(client: Client) -> None:
    answer = client.chat([("user", QUESTION)], max_tokens=5, top_logprobs=4)
    for event in answer.events:
        assert event.logprob is not None
        assert len(event.top) == 4
        assert event.top[0].token == event.token
        assert event.top[0].logprob == event.logprob <= 0
        assert [t.logprob for t in event.top] == sorted((t.logprob for t in event.top), reverse=True)


def test_every_token_tells_where_its_time_went(client: Client) -> None:
    """The times of the tokens add up to the answer's, and only requests that asked for them get them."""
    answer = client.chat([("user", QUESTION)], max_tokens=6, stage_timings=True)
    assert answer.finish_reason == "length"
    assert [[s.worker for s in event.stages] for event in answer.events] == [[s.worker for s in answer.stages]] * 6
    for i, whole in enumerate(answer.stages):
        shares = [event.stages[i] for event in answer.events]
        assert all(s.compute_ms > 0 and s.wire_ms >= 0 and s.wait_ms >= 0 for s in shares)
        for name in ("compute_ms", "wire_ms", "wait_ms"):
            assert sum(getattr(s, name) for s in shares) == pytest.approx(getattr(whole, name), abs=1e-6)
    assert not any(event.stages for event in client.chat([("user", QUESTION)], max_tokens=2).events)


def test_a_bias_forbids_a_token(client: Client) -> None:
    first = client.chat([("user", QUESTION)], max_tokens=1).tokens[0]
    other = client.chat([("user", QUESTION)], max_tokens=1, logit_bias={first: -100.0}).tokens[0]
    assert other != first


def test_a_penalty_breaks_a_loop(client: Client) -> None:
    plain = client.generate("the the the the", max_tokens=40, ignore_eos=True)
    varied = client.generate("the the the the", max_tokens=40, ignore_eos=True, frequency_penalty=2.0)
    assert len(set(varied.tokens)) > len(set(plain.tokens)) or varied.tokens != plain.tokens
    counts = max(varied.tokens.count(t) for t in set(varied.tokens))
    assert counts <= max(plain.tokens.count(t) for t in set(plain.tokens))


def test_characters_are_never_cut(client: Client) -> None:
    """A hot answer full of stray bytes: the pieces are, byte for byte, what all its tokens decode to at once."""
    tokenizer = load_tokenizer(resolve_model("faq"))
    torn = 0
    for seed in range(4):
        stream = client.stream("héé 你好 🙂 ", max_tokens=100, temperature=2.0, seed=seed, ignore_eos=True)
        events = list(stream)
        assert stream.finish is not None
        torn += sum(1 for e in events if not e.text)
        said = "".join(e.text for e in events) + stream.finish.text
        assert said == tokenizer.decode([e.token for e in events])
    assert torn > 0


def test_a_seed_that_was_not_given_is_drawn_and_told(client: Client) -> None:
    first = client.generate("a", max_tokens=12, temperature=1.5, ignore_eos=True)
    again = client.generate("a", max_tokens=12, temperature=1.5, seed=first.seed, ignore_eos=True)
    other = client.generate("a", max_tokens=12, temperature=1.5, ignore_eos=True)
    assert first.tokens == again.tokens
    assert other.seed != first.seed


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": 3.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 1.4e-45}, "repetition_penalty"),
        ({"presence_penalty": -3.0}, "presence_penalty"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_makes_no_sense_names_its_field(client: Client, options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as refusal:
        client.generate("a", **options)  # type: ignore[arg-type]
    assert refusal.value.field == field


def test_a_prompt_that_cannot_fit_is_refused_with_figures(client: Client) -> None:
    context = client.models()[0].max_context
    with pytest.raises(PromptTooLong, match=f"has {context + 5} tokens and the context holds {context}"):
        client.generate([1] * (context + 5))
    with pytest.raises(PromptTooLong, match="ask for at most 10"):
        client.generate([1] * (context - 10), max_tokens=11)


def test_a_model_that_is_not_served_is_not_found(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="not served here; use faq"):
        client.generate("a", model="llama-99")
    with pytest.raises(InvalidRequest, match="role"):
        client.chat([("robot", "hi")])
    with pytest.raises(InvalidRequest, match="token id 999999"):
        client.generate([999_999])


def test_abort_ends_a_live_request(client: Client) -> None:
    stream = client.stream("tell me", request_id="long-one", max_tokens=900, ignore_eos=True)
    tokens = iter(stream)
    assert next(tokens).index == 0
    assert any(r.request_id == "long-one" for r in client.cluster().requests)
    client.abort("long-one")
    with pytest.raises(Aborted, match="long-one"):
        list(tokens)
    with pytest.raises(RequestNotFound, match="long-one"):
        client.abort("long-one")


def test_a_deadline_ends_the_request_on_the_server_too(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate("a", max_tokens=900, ignore_eos=True, timeout_s=0.5)
    settle(client)


def settle(client: Client) -> None:
    """Wait until no request is live and no stage holds caches."""
    deadline = time.monotonic() + 10
    while True:
        state = client.cluster()
        if not state.requests and not any(w.sequences for w in state.workers):
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


def test_clients_that_disconnect_leave_nothing_behind(session_cluster: Cluster, client: Client) -> None:
    """Many times: read a few tokens of a long answer, hang up. Caches go on every stage, no process grows."""

    def hang_up(times: int) -> None:
        for i in range(times):
            with client.stream("a story", max_tokens=800, ignore_eos=True) as stream:
                for token in stream:
                    if token.index >= i % 4:
                        break
        settle(client)

    hang_up(20)
    before = session_cluster.footprints()
    hang_up(effort(80, 200))
    after = session_cluster.footprints()
    for old, new in zip(before, after, strict=True):
        assert new.threads <= old.threads + 2
        assert new.files <= old.files + 2
        assert new.resident <= old.resident + 24 * MIB
    state = client.cluster()
    used = {w.name: w for w in state.workers}
    for stage in state.stages:
        assert used[stage.worker].sequences == 0
        assert used[stage.worker].memory_used <= stage.weight_bytes + stage.prefix_bytes + 64 * KIB


def test_many_readers_at_once_through_the_async_client(address: str, client: Client) -> None:
    expected = client.chat([("user", QUESTION)], max_tokens=24).text

    async def ask_all() -> list[str]:
        async with AsyncClient(address, timeout_s=60) as asking:
            answers = [asking.chat([("user", QUESTION)], max_tokens=24) for _ in range(12)]
            return [a.text for a in await asyncio.gather(*answers)]

    assert asyncio.run(ask_all()) == [expected] * 12


def test_a_request_waits_its_turn_and_can_be_seen(client: Client) -> None:
    lanes = client.cluster().max_sequences
    streams = [client.stream("a", max_tokens=400, ignore_eos=True) for _ in range(lanes)]
    answers = [iter(stream) for stream in streams]
    for answer in answers:
        next(answer)
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (client.generate("b", max_tokens=2, request_id="late"), done.set()))
    waiting.start()
    deadline = time.monotonic() + 10
    while not any(r.request_id == "late" and r.state == "queued" for r in client.cluster().requests):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not done.is_set()
    for stream in streams:
        stream.cancel()
    waiting.join(20)
    assert done.is_set()


def test_health_tells_the_truth_and_reflection_names_the_services(address: str, client: Client) -> None:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="cluster.v1.InferenceService")
        assert health.Check(asked, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {"cluster.v1.InferenceService", "cluster.v1.ClusterService", "grpc.health.v1.Health"} <= services
        client.unload()
        assert health.Check(asked, timeout=5).status == health_pb2.HealthCheckResponse.NOT_SERVING
    serve_model(client, "faq", 2)


STRANGER = """
import sys
import grpc
from cluster.v1 import inference_pb2, inference_pb2_grpc
assert "macpipe_stranger" in inference_pb2.__file__
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    message = inference_pb2.ChatMessage(role="user", content="What is macpipe?")
    request = inference_pb2.ChatRequest(messages=[message])
    for event in stub.Chat(request, timeout=60):
        print(event.token.text, end="")
"""


def test_a_client_built_from_the_protos_alone_works(address: str, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "macpipe_stranger"
    (out / "cluster" / "v1").mkdir(parents=True)
    (out / "cluster" / "__init__.py").touch()
    (out / "cluster" / "v1" / "__init__.py").touch()
    protos = Path(__file__).parents[2] / "protos"
    files = [str(p) for p in (protos / "cluster" / "v1").glob("*.proto")]
    make = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", f"--python_out={out}", f"--grpc_python_out={out}"]
    subprocess.run([*make, *files], check=True, timeout=60)
    asked = subprocess.run(
        [sys.executable, "-c", STRANGER, address],
        cwd=out,
        env={"PYTHONPATH": str(out)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == client.chat([("user", QUESTION)]).text


def macpipe(address: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    arguments = (*arguments, "--coordinator", address)
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, text=True, timeout=60)


def test_the_commands_print_what_the_design_promises(address: str, client: Client) -> None:
    done = macpipe(address, "generate", "-p", QUESTION, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["text"] == client.chat([("user", QUESTION)]).text
    assert facts["finish_reason"] == "stop"
    counts = {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert set(facts["usage"]) == counts | {"accepted_prediction_tokens", "rejected_prediction_tokens"}
    assert {"ttft_ms", "tpot_ms", "tokens_per_second"} <= set(facts["timings"])
    assert [s["layers"] for s in facts["stages"]] == [[0, 4], [4, 8]]
    assert set(facts["stages"][0]) == {"worker", "layers", "compute_ms", "wire_ms", "wait_ms"}
    plain = macpipe(address, "generate", "-p", QUESTION)
    assert plain.stdout.strip() == facts["text"].strip()
    raw = json.loads(macpipe(address, "generate", "-p", QUESTION, "--raw", "--json", "--max-tokens", "4").stdout)
    assert raw["usage"]["prompt_tokens"] < facts["usage"]["prompt_tokens"]


def test_an_answer_is_traced_through_the_stages(address: str, client: Client, tmp_path: Path) -> None:
    answer = client.generate([1, 2, 3], max_tokens=5, ignore_eos=True)
    trace = client.trace(answer.request_id)
    assert (trace.request_id, trace.prompt_tokens, trace.complete) == (answer.request_id, 3, True)
    assert [index for frame in trace.frames if frame.own for index in frame.tokens] == [0, 1, 2, 3, 4]
    (epoch,) = trace.epochs
    workers = [stage.worker for stage in client.cluster().stages]
    assert [stage.worker for stage in epoch.stages] == workers
    for frame in trace.frames:
        assert 0 <= frame.sent_seconds < frame.returned_seconds <= (trace.ended_seconds or 0) + 1
        assert [timing.stage for timing in frame.timings] == [0, 1]
        inside_s = sum(timing.compute_us + timing.wait_us for timing in frame.timings) / 1e6
        assert inside_s < frame.returned_seconds - frame.sent_seconds
    written = tmp_path / "trace.json"
    done = macpipe(address, "trace", answer.request_id, "-o", str(written))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"frames of request {answer.request_id}" in done.stderr
    events = json.loads(written.read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"coordinator", *workers}
    assert json.loads(macpipe(address, "trace", "-o", "-").stdout)["otherData"]["request"] == answer.request_id
    with pytest.raises(RequestNotFound, match="no trace of request nobodys"):
        client.trace("nobodys")


def test_status_and_ps_show_the_cluster(address: str) -> None:
    status = json.loads(macpipe(address, "status", "--json").stdout)
    assert status["state"] == "serving"
    assert status["model"] == "faq"
    assert {w["name"] for w in status["workers"]} == {"ada", "bob", "cyd", "dee"}
    shown = macpipe(address, "status").stdout
    for word in ("faq", "ada", "dee", "serving"):
        assert word in shown
    assert macpipe(address, "ps").returncode == 0
    assert json.loads(macpipe(address, "ps", "--json").stdout)["requests"] == []


def test_chat_remembers_and_takes_turns_from_a_pipe(address: str, client: Client) -> None:
    said = macpipe(address, "chat", stdin=f"{QUESTION}\n/quit\n")
    assert said.returncode == 0, said.stderr
    assert client.chat([("user", QUESTION)]).text.strip() in said.stdout
