"""Every field of what coordinator, worker and client share survives its message, new ones included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pytest

from cluster.codec.answer import decode_token, encode_token
from cluster.codec.cluster_state import decode_cluster_state, encode_cluster_state
from cluster.codec.conversation import decode_message, decode_tool_choice, encode_message, encode_tool_choice
from cluster.codec.examination import (
    MAX_FINDING_CHARS,
    MAX_FINDINGS,
    decode_examination,
    decode_results,
    encode_examination,
    encode_results,
)
from cluster.codec.leadership import decode_claim, encode_leads_request, encode_leads_response
from cluster.codec.plan import decode_plan, decode_progress, encode_plan, encode_progress
from cluster.codec.request_trace import decode_trace, encode_trace
from cluster.codec.stored_models import (
    MAX_STORED_MODELS,
    decode_removal,
    decode_store,
    decode_worker_store,
    encode_removal,
    encode_store,
)
from cluster.codec.worker_info import decode_info, encode_info
from cluster.core.cluster_state import ClusterState, EventKind, ModelPlan, RequestState, ServingState
from cluster.core.errors import InvalidRequest, MacpipeError, WorkerLost
from cluster.core.examination import CheckResult, Finding, MacExamination, Severity
from cluster.core.leadership import CoordinatorRole, LeaderClaim
from cluster.core.limits import MAX_FACT_CHARS, MAX_LAG_S
from cluster.core.link_limits import MAX_DATA_HOSTS
from cluster.core.plan import LayerRange, LoadProgress
from cluster.core.request import ChatMessage, TokenEvent, ToolChoice
from cluster.core.request_trace import RequestTrace
from cluster.core.stored_models import MacStore, StoredModel, StoreRemoval
from cluster.core.text import parse_address
from cluster.core.worker import WorkerInfo
from cluster.v1 import cluster_pb2, inference_pb2, leader_pb2, worker_pb2

T = TypeVar("T")


def sample(kind: type[T]) -> T:
    """A value of ``kind`` in which every field differs from every other one and from its default."""
    made: T = _value(kind, itertools.count(1))
    assert is_dataclass(made)
    for field in fields(made):
        assert field.default is MISSING or getattr(made, field.name) != field.default, field.name
    return made


def _value(kind: Any, numbers: Iterator[int]) -> Any:
    if get_origin(kind) is tuple:
        one, *more = get_args(kind)
        return tuple(_value(part, numbers) for part in ((one, one) if more == [...] else (one, *more)))
    if get_origin(kind) is UnionType:
        return _value(next(part for part in get_args(kind) if part is not NoneType), numbers)
    if kind is LayerRange:
        return LayerRange(start := next(numbers), start + 1)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: _value(hints[field.name], numbers) for field in fields(kind)})
    if issubclass(kind, Enum):
        return list(kind)[1]
    if kind is bool:
        return True
    return f"text{next(numbers)}" if kind is str else kind(next(numbers))


def a_worker() -> WorkerInfo:
    return replace(sample(WorkerInfo), data_hosts=("10.0.0.5", "fd00::5"))


def test_a_worker_tells_its_coordinator_everything() -> None:
    info = replace(a_worker(), control_address="mac.local:7", data_address="mac.local:9", lag_seconds=0.5)
    info = replace(info, profile=replace(info.profile, verify_costs=((2, 1.25), (8, 3.5))))
    _, port = parse_address(info.data_address)
    answer = encode_info(info, data_port=port, problem="p", clock=3.0)
    sent = worker_pb2.DescribeResponse.FromString(answer.SerializeToString())
    assert decode_info(sent, info.control_address, info.clock_ahead_seconds) == info
    assert (sent.problem, sent.clock) == ("p", 3.0)


def test_a_coordinator_tells_its_clients_everything() -> None:
    state = sample(ClusterState)
    state = replace(state, workers=tuple(replace(w, lag_seconds=0.25 * i) for i, w in enumerate(state.workers)))
    sent = cluster_pb2.GetClusterResponse.FromString(encode_cluster_state(state).SerializeToString())
    assert decode_cluster_state(sent) == state
    empty = ClusterState("c", "1", ServingState.IDLE)
    assert decode_cluster_state(encode_cluster_state(empty)) == empty
    plan = sample(ModelPlan)
    assert decode_plan(encode_plan(plan)) == plan
    assert decode_plan(encode_plan(replace(plan, forecast=None))).forecast is None
    progress = sample(LoadProgress)
    assert decode_progress(encode_progress(progress)) == progress
    trace = sample(RequestTrace)
    assert decode_trace(inference_pb2.TraceResponse.FromString(encode_trace(trace).SerializeToString())) == trace
    assert decode_trace(encode_trace(replace(trace, ended_seconds=None))).ended_seconds is None
    token = replace(sample(TokenEvent), state=b"")  # an answer has no embeddings
    assert decode_token(encode_token(token)) == token
    assert decode_token(encode_token(replace(token, logprob=None))).logprob is None


def test_coordinators_tell_each_other_everything() -> None:
    claim = sample(LeaderClaim)
    answer = leader_pb2.LeadsResponse.FromString(encode_leads_response(claim).SerializeToString())
    assert decode_claim(answer) == claim
    assert decode_claim(encode_leads_response(replace(claim, leader=None))).leader is None
    asked = leader_pb2.LeadsRequest.FromString(encode_leads_request(claim).SerializeToString())
    assert decode_claim(asked) == replace(claim, leader=None)
    asked.role = 99  # type: ignore[assignment]
    assert decode_claim(asked).role is CoordinatorRole.UNKNOWN


def test_every_state_survives_and_an_unknown_one_is_unknown() -> None:
    state = sample(ClusterState)
    for serving in ServingState:
        assert decode_cluster_state(encode_cluster_state(replace(state, state=serving))).state is serving
    for phase in RequestState:
        one = replace(state, requests=(replace(state.requests[0], state=phase, lane=None),))
        assert decode_cluster_state(encode_cluster_state(one)).requests == one.requests
    newer = encode_cluster_state(state)
    newer.state, newer.requests[0].state, newer.events[0].kind = 99, 99, 99
    assert decode_cluster_state(newer).state is ServingState.UNKNOWN
    assert decode_cluster_state(newer).requests[0].state is RequestState.UNKNOWN
    assert decode_cluster_state(newer).events[0].kind is EventKind.UNKNOWN


def test_impossible_layers_are_a_protocol_error() -> None:
    reply = encode_cluster_state(sample(ClusterState))
    reply.stages[0].end_layer = 0
    with pytest.raises(MacpipeError, match="protocol error from the coordinator"):
        decode_cluster_state(reply)


@pytest.mark.parametrize(
    ("field", "claim"),
    [
        ("name", "\x1b[2J"),
        ("chip", "x" * (MAX_FACT_CHARS + 1)),
        ("memory_pressure", "\x1b[2J"),
        ("fingerprint", "x" * (MAX_FACT_CHARS + 1)),
        ("data_port", 70_000),
        ("start_layer", 1000),
        ("data_hosts", ["mac.local"]),
        ("data_hosts", ["10.0.0.6"] * MAX_DATA_HOSTS),
    ],
)
def test_a_worker_that_claims_what_cannot_be_is_not_believed(field: str, claim: object) -> None:
    answer = encode_info(a_worker(), data_port=9, problem="", clock=0.0)
    decode_info(answer, "a:1", 0.0)
    if isinstance(claim, list):
        getattr(answer, field).extend(claim)
    else:
        setattr(answer, field, claim)
    with pytest.raises(WorkerLost, match="the process at a:1 sent an invalid worker description"):
        decode_info(answer, "a:1", 0.0)


@pytest.mark.parametrize(("claimed", "believed"), [(-1.0, 0.0), (1e9, MAX_LAG_S), (float("nan"), 0.0)])
def test_a_lag_is_believed_within_reason(claimed: float, believed: float) -> None:
    answer = encode_info(replace(a_worker(), lag_seconds=claimed), data_port=9, problem="", clock=0.0)
    assert decode_info(answer, "a:1", 0.0).lag_seconds == believed


@pytest.mark.parametrize(("claimed", "believed"), [(-1.0, 0.0), (1e300, 10_000.0), (float("inf"), 0.0), (41.5, 41.5)])
def test_a_power_is_believed_within_reason(claimed: float, believed: float) -> None:
    answer = encode_info(replace(a_worker(), power_watts=claimed), data_port=9, problem="", clock=0.0)
    assert decode_info(answer, "a:1", 0.0).power_watts == believed


def test_a_client_tells_its_coordinator_everything_of_a_conversation() -> None:
    message = sample(ChatMessage)
    sent = inference_pb2.ChatMessage.FromString(encode_message(message).SerializeToString())
    assert decode_message(sent) == message
    for choice in ToolChoice:
        assert decode_tool_choice(encode_tool_choice(choice)) is choice
    assert decode_tool_choice(inference_pb2.ToolChoice()) is ToolChoice.AUTO
    with pytest.raises(InvalidRequest, match="unknown mode 99"):
        decode_tool_choice(inference_pb2.ToolChoice(mode=99))  # type: ignore[arg-type]


def test_an_examination_survives_and_its_findings_name_the_mac() -> None:
    found = tuple(Finding(severity, f"what {severity}", "why", "remedy", "mac-2") for severity in Severity)
    examined = MacExamination("mac-2", (CheckResult("disk", found), CheckResult("sleep"), CheckResult("RDMA", None)))
    sent = cluster_pb2.MacExamination.FromString(encode_examination(examined).SerializeToString())
    assert decode_examination(sent) == examined
    newer = encode_examination(examined)
    newer.results[0].findings[0].severity = 99
    assert (decode_examination(newer).results[0].findings or ())[0].severity is Severity.NOTE


def test_a_worker_that_finds_too_much_is_not_believed() -> None:
    long = Finding(Severity.NOTE, "x" * (MAX_FINDING_CHARS + 1), "")
    many = (CheckResult("disk", (long,) * (MAX_FINDINGS + 1)),)
    decode_results(encode_results(many), "ada")
    too_long = cluster_pb2.CheckResult(findings=[cluster_pb2.Finding(what=long.what)])
    too_many = cluster_pb2.CheckResult(findings=[cluster_pb2.Finding()] * (MAX_FINDINGS + 1))
    for invalid in (too_long, too_many, cluster_pb2.CheckResult(check="x" * (MAX_FACT_CHARS + 1))):
        with pytest.raises(WorkerLost, match="worker ada sent an invalid examination"):
            decode_results([invalid], "ada")


def test_a_store_survives_and_what_became_of_its_models() -> None:
    model = sample(StoredModel)
    store = replace(sample(MacStore), models=(replace(model, folder=f"/models/{model.fingerprint}"),), folder="/models")
    assert decode_store(cluster_pb2.MacStore.FromString(encode_store(store).SerializeToString())) == store
    removal = sample(StoreRemoval)
    assert decode_removal(cluster_pb2.StoreRemoval.FromString(encode_removal(removal).SerializeToString())) == removal
    many = encode_store(replace(store, models=store.models * (MAX_STORED_MODELS + 5)))
    assert (len(many.models), many.omitted) == (MAX_STORED_MODELS, store.omitted + 5)


@pytest.mark.parametrize(
    ("field", "claim"),
    [
        ("fingerprint", "../../x"),
        ("names", ["\x1b[2J"]),
        ("names", ["a"] * 5),
        ("last_used", float("nan")),
        ("layers", [cluster_pb2.LayerSpan(start=4, end=4)]),
    ],
)
def test_a_worker_that_lists_impossible_models_is_not_believed(field: str, claim: Any) -> None:
    message = encode_store(MacStore("", "/models", "id", (replace(sample(StoredModel), fingerprint="ab" * 32),)))
    assert decode_worker_store(message, "ada").mac == "ada"
    message.models[0].ClearField(field)
    message.models[0].MergeFrom(cluster_pb2.StoredModel(**{field: claim}))
    with pytest.raises(WorkerLost, match="worker ada sent an invalid list of its models"):
        decode_worker_store(message, "ada")
