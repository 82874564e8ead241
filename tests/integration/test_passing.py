"""Clients that know a standby alone: what they get is the leader's, also after the leader was killed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from cluster.client import Client
from integration.daemons import Daemon, free_port, launch, until, wait_serving
from integration.test_standby import Coordinators, kill, leader_of, named, undisturbed

pytestmark = [pytest.mark.long, pytest.mark.timeout(300), pytest.mark.xdist_group("faults")]
CHAT = {
    "messages": [{"role": "user", "content": "What is a hop?"}],
    "temperature": 0.7,
    "seed": 3,
    "max_tokens": 60,
    "stream": True,
}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": {"messages": CHAT["messages"], "model": "faq", "temperature": 0, "max_tokens": 60, "stream": True},
    "/v1/responses": {"input": "What is a hop?", "temperature": 0, "max_output_tokens": 60, "stream": True},
    "/v1/completions": {"prompt": "A hop is", "temperature": 0, "max_tokens": 60, "stream": True},
}


MODELS = """
[[model]]
name = "big"
source = "faq"
workers = 3

[[model]]
name = "wide"
source = "faq"
workers = 4
"""


class WithHttp(Coordinators):
    """Coordinators with HTTP ports."""

    def serve(self, name: str, *options: str) -> Daemon:
        port = self.ports.setdefault(name, free_port())
        http = self.ports.setdefault(f"{name} http", free_port())
        home = ["--home", str(self.folder / name), "--cluster", self.cluster.name]
        here = ["--http", f"127.0.0.1:{http}", "--port", str(port), "--peers-only"]
        return self.cluster._start(name, ["serve", *options, *home, *here], launch)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[f'{name} http']}"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[WithHttp]:
    """A leader, ``lead``, and a standby that is in sync, ``heir``."""
    made = WithHttp(tmp_path)
    try:
        leader = made.lead("lead")
        wait_serving(made.address("lead"), leader)
        made.serve("heir", "--standby", "--coordinator", made.address("lead"))
        until(lambda: made.in_sync("lead") == 1)
        yield made
    finally:
        made.cluster.close()


def events(text: str) -> list[str]:
    """The data of the events of a stream, without its ids, its times and what is sent during silence."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [_text(json.loads(one)) for one in found if one != "[DONE]" and json.loads(one).get("type") != "ping"]


def _text(data: dict[str, Any]) -> str:
    """What an event says of the answer."""
    if "choices" in data:
        return json.dumps(data["choices"])
    delta = data.get("delta")
    return str(delta.get("text", "") if isinstance(delta, dict) else delta or data["type"])


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_through_a_standby_goes_on_after_the_leader_was_killed(pair: WithHttp, route: str) -> None:
    with httpx.Client(base_url=pair.url("heir"), timeout=120) as client:
        whole = client.post(route, json=ROUTES[route]).text
        received, killed = "", False
        with client.stream("POST", route, json=ROUTES[route]) as response:
            assert response.status_code == 200
            for piece in response.iter_text():
                received += piece
                if not killed and received.count("data: ") > 10:
                    killed = True
                    leader_of(pair).process.send_signal(signal.SIGKILL)
        assert killed
        assert events(received) == events(whole)
        ids = {json.loads(line[6:]).get("id") for line in received.splitlines() if line.startswith('data: {"id"')}
        assert len(ids) <= 1
        assert client.get("/health").status_code == 200


def test_each_coordinator_answers_metrics_about_itself(pair: WithHttp) -> None:
    def lines(name: str) -> set[str]:
        with httpx.Client(base_url=pair.url(name), timeout=20) as client:
            return set(client.get("/metrics").text.splitlines())

    until(lambda: "macpipe_in_sync_with_leader 1.0" in lines("heir"))
    assert "macpipe_leader 0.0" in lines("heir")
    assert not [
        line for line in lines("heir") if line.startswith(("macpipe_worker", "macpipe_state", "macpipe_standby"))
    ]
    assert "macpipe_leader 1.0" in lines("lead")
    assert [one for one in lines("lead") if one.startswith("macpipe_standby_in_sync{") and one.endswith(" 1.0")]
    kill(leader_of(pair))
    until(lambda: "macpipe_leader 1.0" in lines("heir"))


def test_several_samples_through_a_standby_go_on_each_with_its_own_tokens(pair: WithHttp) -> None:
    route, asked = "/v1/completions", {**ROUTES["/v1/completions"], "n": 3, "temperature": 1.0, "seed": 5}

    def texts(stream: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for one in events(stream):
            for choice in json.loads(one):
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        return found

    with httpx.Client(base_url=pair.url("heir"), timeout=120) as client:
        whole = texts(client.post(route, json=asked).text)
        assert len(set(whole.values())) == 3
        received, killed = "", False
        with client.stream("POST", route, json=asked) as response:
            for piece in response.iter_text():
                received += piece
                if not killed and received.count("data: ") > 20:
                    killed = True
                    leader_of(pair).process.send_signal(signal.SIGKILL)
    assert killed
    assert texts(received) == whole
    assert received.endswith("data: [DONE]\n\n")


def test_openais_client_with_one_address_does_not_notice_that_the_leader_was_killed(pair: WithHttp) -> None:
    with openai.OpenAI(base_url=f"{pair.url('heir')}/v1", api_key="none", max_retries=0) as client:

        def ask() -> openai.Stream[ChatCompletionChunk]:
            return client.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": "What is a hop?"}],
                max_tokens=60,
                seed=3,
                stream=True,
            )

        whole = [chunk.choices[0].delta.content for chunk in ask()]
        said = []
        for chunk in ask():
            said.append(chunk.choices[0].delta.content)
            if len(said) == 10:
                leader_of(pair).process.send_signal(signal.SIGKILL)
        assert said == whole


def test_a_whole_response_comes_from_the_next_leader_if_the_leader_was_killed_before_it(pair: WithHttp) -> None:
    asked = {**CHAT, "stream": False, "max_tokens": 100, "ignore_eos": True}
    with httpx.Client(base_url=pair.url("heir"), timeout=120) as client, ThreadPoolExecutor(1) as pool:
        whole = client.post("/v1/chat/completions", json=asked).json()
        waiting = pool.submit(client.post, "/v1/chat/completions", json=asked)
        until(lambda: bool((state := pair.state("lead")) and state.requests))
        leader_of(pair).process.send_signal(signal.SIGKILL)
        response = waiting.result()
    assert response.status_code == 200
    assert response.json()["choices"] == whole["choices"]


def test_calls_through_a_standby_alone_go_on_after_the_leader_was_killed(pair: WithHttp) -> None:
    whole, said = undisturbed(pair), []
    with Client(pair.address("heir"), timeout_s=120) as client:
        assert client.cluster().leadership
        for token in client.stream([5, 6, 7], max_tokens=60, ignore_eos=True):
            said.append(token.token)
            if len(said) == 10:
                leader_of(pair).process.send_signal(signal.SIGKILL)
    assert said == whole


def test_http_answers_from_a_leaders_own_port_end_as_it_hands_over_and_say_to_send_the_request_again(
    pair: WithHttp,
) -> None:
    asked = {**CHAT, "max_tokens": 400, "ignore_eos": True}
    with httpx.Client(base_url=pair.url("lead"), timeout=120) as client, ThreadPoolExecutor(1) as pool:
        with client.stream("POST", "/v1/chat/completions", json=asked) as stream:
            pieces = stream.iter_text()
            received = next(pieces)
            waiting = pool.submit(client.post, "/v1/chat/completions", json={**asked, "stream": False})
            until(lambda: len(state.requests) == 2 if (state := pair.state("lead")) else False)
            with Client(pair.address("lead"), timeout_s=20) as admin:
                admin.hand_over()
            received += "".join(pieces)
        whole = waiting.result()
        assert json.loads(received.split("data: ")[-1])["error"]["code"] == "not_leader"
        assert (whole.status_code, whole.headers["retry-after"]) == (503, "1")
        for error in (received, whole.text):
            assert "takes its place; send the request again" in error
        again = client.post("/v1/chat/completions", json={**CHAT, "stream": False, "max_tokens": 5})
        assert again.status_code == 200


def test_new_requests_wait_for_the_model_that_the_next_leader_loads_again(pair: WithHttp) -> None:
    asked = {**CHAT, "stream": False, "max_tokens": 5}
    heir, done = named(pair, "heir"), Event()

    def ask_all_the_time() -> list[tuple[int, str]]:
        answers = []
        with httpx.Client(base_url=pair.url("heir"), timeout=120) as client:
            while not done.is_set():
                for body in (asked, {**asked, "stream": True}):
                    response = client.post("/v1/chat/completions", json=body)
                    answers.append((response.status_code, response.text))
        return answers

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_all_the_time) for _ in range(2)]
        try:
            kill(leader_of(pair), named(pair, "cyd"))  # so that the layers are loaded by the workers that are left
            heir.wait_for("leader: listening")
            with Client(pair.address("heir"), timeout_s=60) as client:
                assert client.chat([("user", "What is a hop?")], max_tokens=5).text
        finally:
            done.set()
        answers = [answer for one in asking for answer in one.result()]
    assert "loading faq again" in heir.said() or "the workers that are left" in heir.said()
    assert [answer for answer in answers if answer[0] != 200 or '"error"' in answer[1]] == []


@pytest.mark.parametrize("ends", ["SIGTERM", "handover"])
def test_what_a_leader_has_not_accepted_before_it_hands_over_is_answered_by_the_next(pair: WithHttp, ends: str) -> None:
    addresses = f"{pair.address('lead')},{pair.address('heir')}"

    def ask(number: int) -> str:
        schema = {"type": "object", "properties": {f"p{number}_{i}": {"type": "string"} for i in range(300)}}
        with Client(addresses, timeout_s=120) as client:
            return client.chat([("user", "hop " * 50)], max_tokens=5, json_schema=json.dumps(schema)).finish_reason

    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(ask, number) for number in range(16)]
        time.sleep(0.3)
        if ends == "SIGTERM":
            leader_of(pair).process.send_signal(signal.SIGTERM)
        else:
            with Client(pair.address("lead"), timeout_s=20) as admin:
                admin.hand_over()
        assert [str(one.result()) for one in asking] == ["length"] * 16


@pytest.mark.parametrize("ends", ["SIGTERM", "handover"])
def test_requests_that_wait_for_a_load_as_the_leader_hands_over_are_answered_by_the_next(
    tmp_path: Path, ends: str
) -> None:
    """The load waits for a fourth Mac, which comes when another coordinator leads."""
    file, late, made = tmp_path / "models.toml", free_port(), WithHttp(tmp_path)
    file.write_text(MODELS)
    options = ("--models", str(file), "--wait", "120", "--replicate", "sync", *made.peers)
    asked = {**CHAT, "model": "wide", "max_tokens": 5}

    def ask_both() -> str:
        with Client(f"{made.address('lead')},{made.address('heir')}", timeout_s=120) as client:
            return str(client.chat([("user", "What is a hop?")], max_tokens=5, model="wide").finish_reason)

    def ask_http(*, stream: bool) -> str:
        body = {**asked, "stream": stream}
        response = httpx.post(f"{made.url('heir')}/v1/chat/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.text

    try:
        leader = made.serve("lead", *options, "--peer", f"127.0.0.1:{late}")
        wait_serving(made.address("lead"), leader)
        heir = made.serve("heir", "--standby", "--coordinator", made.address("lead"))
        until(lambda: made.in_sync("lead") == 1)
        with ThreadPoolExecutor(3) as pool:
            by_client, whole, stream = (
                pool.submit(ask_both),
                pool.submit(ask_http, stream=False),
                pool.submit(ask_http, stream=True),
            )
            with Client(made.address("lead"), timeout_s=20) as admin:
                time.sleep(3)  # so that all three wait for it
                if ends == "SIGTERM":
                    leader.process.send_signal(signal.SIGTERM)
                else:
                    admin.hand_over()
            heir.wait_for("leader: serving")
            made.cluster.worker("dan", "--port", str(late))
            assert by_client.result() == "length"
            assert json.loads(whole.result())["choices"][0]["finish_reason"] == "length"
            assert '"finish_reason":"length"' in stream.result().replace(" ", "")
            assert '"error"' not in stream.result()
    finally:
        made.cluster.close()
