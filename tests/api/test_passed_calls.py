"""A standby passes gRPC calls on: the leader sees who calls, and the client what the leader answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server

from client.scripted import Coordinator, answer_of, prompt_event
from cluster.api.grpc.inference_service import IGNORED_METADATA, client_name
from cluster.api.passing.leader_channel import LeaderChannel
from cluster.api.passing.passed_calls import PassedCalls
from cluster.client import Client
from cluster.client.deadlines import translate_errors
from cluster.core import errors
from cluster.core.leadership import CoordinatorName
from cluster.security.credentials import LocalTrust
from cluster.security.passed_caller import CALLER_METADATA
from cluster.security.roles import Role
from cluster.security.trust import COORDINATOR, Trust
from cluster.transport.byte_budget import ByteBudget
from cluster.v1 import inference_pb2
from cluster.v1.inference_pb2_grpc import InferenceServiceStub
from parties import Lead


class StandingBy(Coordinator):
    """A standby on a real socket. It knows the ``leader``, and holds at most ``most`` bytes of requests."""

    def __init__(self, leader: CoordinatorName | None, trust: Trust | None = None, most: int = 1 << 30) -> None:
        super().__init__(trust=trust)
        self.leader, self._used, self._bodies = leader, trust or LocalTrust(), ByteBudget(most)

    def add_services(self, server: grpc.aio.Server) -> None:
        channel = LeaderChannel(self._used, lambda: self.leader)
        calls = PassedCalls(channel, self._bodies, lambda context: client_name(self._used, context))
        server.add_generic_rpc_handlers((calls,))


def named(*addresses: str) -> CoordinatorName:
    return CoordinatorName("mac-1", "1", addresses)


class Healthy(Coordinator):
    """A leader that tells its health, too."""

    def add_services(self, server: grpc.aio.Server) -> None:
        super().add_services(server)
        add_HealthServicer_to_server(HealthServicer(), server)


@pytest.fixture(scope="module")
def leader() -> Iterator[Coordinator]:
    with Healthy() as running:
        yield running


@pytest.fixture(scope="module")
def standby(leader: Coordinator) -> Iterator[StandingBy]:
    with StandingBy(named(leader.address)) as running:
        yield running


@pytest.fixture
def script(leader: Coordinator) -> Iterator[Coordinator]:
    """The leader. What a test changes of its script is undone."""
    yield leader
    leader.script.refusal = None
    leader.script.__dict__.pop("answer", None)
    leader.script.cancelled.clear()


def test_calls_of_all_forms_are_answered_by_the_leader(standby: StandingBy) -> None:
    with Client(standby.address) as client:
        assert client.generate("Why?").text == "Macs pass layers on."
        assert client.chat([("user", "Why?")]).text == "Macs pass layers on."
        assert client.tokenize("Hi").ids == (1, 2)
        assert client.cluster().model == "faq"
        assert client.load("faq").wait().model == "faq"
    with grpc.secure_channel(standby.address, grpc.local_channel_credentials()) as channel:
        answer = HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_an_error_keeps_its_class_and_when_to_try_again(standby: StandingBy, script: Coordinator) -> None:
    script.script.refusal = errors.Busy("the queue is full", retry_after_s=7.0, code="full")
    with Client(standby.address) as client:
        for ask in (lambda: client.generate("Why?"), client.models):
            with pytest.raises(errors.Busy, match="queue is full") as refused:
                ask()
            assert (refused.value.retry_after_s, refused.value.details) == (7.0, {"code": "full"})


def test_what_the_leader_ignored_and_a_callers_credential_are_passed_on(
    standby: StandingBy, script: Coordinator
) -> None:
    seen: list[Any] = []

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        seen.extend(context.invocation_metadata())
        await context.send_initial_metadata(((IGNORED_METADATA, "top_k"),))
        for event in answer_of(request):
            yield event

    script.script.answer = answer  # type: ignore[method-assign]
    with grpc.secure_channel(standby.address, grpc.local_channel_credentials()) as channel:
        given = (("authorization", "Bearer x"), ("x-other", "y"))
        call = InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(text="Why?"), metadata=given)
        assert len(list(call)) == 7
        assert (IGNORED_METADATA, "top_k") in [tuple(pair) for pair in call.initial_metadata()]
    assert ("authorization", "Bearer x") in [tuple(pair) for pair in seen]
    assert "x-other" not in dict(seen)


def test_a_client_that_leaves_ends_its_call_at_the_leader(standby: StandingBy, script: Coordinator) -> None:
    async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
        yield prompt_event()
        await asyncio.sleep(3600)

    script.script.answer = endless  # type: ignore[method-assign]
    with Client(standby.address) as client, client.stream("Why?") as stream:
        stream.wait_accepted()
    assert script.script.cancelled.wait(10)


def test_a_deadline_is_that_of_the_leaders_call(standby: StandingBy, script: Coordinator) -> None:
    left: list[float] = []

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        left.append(context.time_remaining())
        await asyncio.sleep(3600)
        yield

    script.script.answer = answer  # type: ignore[method-assign]
    with Client(standby.address) as client, pytest.raises(errors.DeadlineExceeded):
        client.generate("Why?", timeout_s=0.5)
    assert all(seconds < 60 for seconds in left), "it has the client's deadline, not none"


def test_a_request_that_no_room_is_left_for_is_refused_here(leader: Coordinator) -> None:
    with StandingBy(named(leader.address), most=1 << 20) as full, Client(full.address) as client:
        before = len(leader.script.seen)
        with pytest.raises(errors.Busy, match="bytes in progress"):
            client.generate("x" * (1 << 20))
        assert client.generate("Why?").text
        assert len(leader.script.seen) == before + 1


def breaking(status: grpc.StatusCode) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        yield prompt_event()
        await context.abort(status, "recvmsg: Connection reset by peer")

    return answer


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_leader_that_is_lost_during_a_call_is_told(
    standby: StandingBy, script: Coordinator, status: grpc.StatusCode
) -> None:
    script.script.answer = breaking(status)  # type: ignore[method-assign]
    with grpc.secure_channel(standby.address, grpc.local_channel_credentials()) as channel:
        call = InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(text="Why?"))
        with pytest.raises(errors.ConnectionLost, match="was lost"), translate_errors(standby.address):
            list(call)


def test_the_leaders_other_address_is_used_if_one_does_not_answer(leader: Coordinator) -> None:
    with StandingBy(named("127.0.0.1:1", leader.address)) as standing, Client(standing.address) as client:
        with pytest.raises(errors.NotLeader, match=r"127\.0\.0\.1:1"):
            client.models()
        assert client.models()


def test_nobody_who_leads_is_told_and_a_new_leader_is_used_at_once(leader: Coordinator) -> None:
    with StandingBy(None) as standing, Client(standing.address) as client:
        with pytest.raises(errors.NotLeader, match="none leads"):
            client.models()
        standing.leader = named(leader.address)
        assert client.models()


def test_what_was_passed_on_is_not_passed_on_again(standby: StandingBy) -> None:
    with (
        StandingBy(named(standby.address)) as second,
        Client(second.address) as client,
        pytest.raises(errors.NotLeader, match="stands by"),
    ):
        client.models()


# In a cluster


@pytest.fixture(scope="module")
def lead(tmp_path_factory: pytest.TempPathFactory) -> Lead:
    made = Lead.make(tmp_path_factory.mktemp("lead") / "mac-1")
    made.admit_coordinator()
    return made


def home_of(lead: Lead, role: Role, name: str, number: int, folder: Path) -> Path:
    lead.admit(role, name, f"{number:016x}", folder / name)
    return folder / name


def test_the_leader_sees_who_calls_and_believes_a_coordinator_alone(
    lead: Lead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = lead.trust(Role.COORDINATOR)
    standby_home = home_of(lead, Role.COORDINATOR, "mac-2", 2, tmp_path)
    standby_trust = lead.trust(Role.COORDINATOR, "", standby_home)
    callers: list[str] = []

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        callers.append(client_name(trust, context))
        for event in answer_of(request):
            yield event

    with Coordinator(trust=trust) as leader, StandingBy(named(leader.address), standby_trust) as standing:
        leader.script.answer = answer  # type: ignore[method-assign]
        monkeypatch.delenv("MACPIPE_COORDINATOR", raising=False)
        for role, number in ((Role.CLIENT, 3), (Role.ADMIN, 4)):
            home = home_of(lead, role, f"the-{role}", number, tmp_path)
            monkeypatch.setenv("MACPIPE_HOME", str(home))
            with Client(standing.address) as client:
                assert client.generate("Why?").text == "Macs pass layers on."
                if role is Role.ADMIN:
                    assert client.unload() == ("faq",)
                else:
                    with pytest.raises(errors.Forbidden, match="the-client is a client"):
                        client.unload()
        assert callers == [f"client.{3:016x}", f"admin.{4:016x}"]
        monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "the-client"))
        pretend = lead.trust(Role.CLIENT, "", tmp_path / "the-client")
        admin = (tmp_path / "the-admin").rglob("certificate.pem")
        credentials, options = pretend.channel("127.0.0.1", COORDINATOR)
        with grpc.secure_channel(leader.address, credentials, options) as channel:
            asserted = ((CALLER_METADATA, next(admin).read_bytes()),)
            with pytest.raises(grpc.RpcError) as refused:
                InferenceServiceStub(channel).ListModels(inference_pb2.ListModelsRequest(), metadata=asserted)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        lead.members.remove("the-client")
        with Client(standing.address) as client, pytest.raises(errors.Unauthenticated, match="was removed"):
            client.models()
        lead.members.remove("mac-2")
        monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "the-admin"))
        with Client(standing.address) as client, pytest.raises(errors.NotLeader, match="was removed") as refused:
            client.models()
        assert refused.value.sentence.startswith("this coordinator was removed"), "it is not the caller's fault"
