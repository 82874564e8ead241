"""Encode and decode a worker's info. A worker's claims are checked here, before anybody uses them.

A worker describes itself to its coordinator with a DescribeResponse; the coordinator reports it to clients as a Worker.
Both messages have the fields of ``WorkerSummary``, by the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Final, TypeAlias

from cluster.core.adapter import MAX_ADAPTERS
from cluster.core.errors import WorkerLost
from cluster.core.limits import KEPT_CORRECTIONS, MAX_FACT_CHARS, MAX_LAG_S, MAX_SENTENCE_CHARS, MAX_SLICES
from cluster.core.link_limits import MAX_DATA_HOSTS
from cluster.core.plan import LayerRange, Profile, valid_verify_costs
from cluster.core.text import HIGHEST_PORT, format_address, is_ip_address, parse_address
from cluster.core.worker import STAGE_FIELDS, HeldSlice, WorkerInfo, WorkerState, WorkerSummary
from cluster.v1 import cluster_pb2, worker_pb2

Summary: TypeAlias = worker_pb2.DescribeResponse | cluster_pb2.Worker
_UNSENT: Final = {"control_address", "data_address", "clock_ahead_seconds"}
"""Fields of a summary that only the coordinator can know."""
_SHARED: Final = tuple(field.name for field in fields(WorkerSummary) if field.name not in _UNSENT)
"""The other fields. They are copied by name, so a new one needs no line here."""
_SLICE: Final = tuple(field.name for field in fields(HeldSlice) if field.name != "layers")
"""Fields of a slice that are copied by name."""
_STAGE: Final = tuple(name for name in STAGE_FIELDS if name != "layers")
"""Fields that describe a worker's stage, as those of a slice do."""
MAX_WATTS: Final = 10_000.0
MAX_JOULES: Final = 1e12
"""Thirty years of a thousand watts."""
_MOST: Final = {"lag_seconds": MAX_LAG_S, "power_watts": MAX_WATTS, "energy_joules": MAX_JOULES}
"""The largest values that a worker's measurements are believed to have."""


def encode_info(info: WorkerInfo, *, data_port: int, problem: str, clock: float) -> worker_pb2.DescribeResponse:
    """Encode a worker's description of itself. ``clock`` is the worker's own, in seconds since the epoch."""
    answer = worker_pb2.DescribeResponse(
        **{name: getattr(info, name) for name in _STAGE},
        cluster=info.cluster,
        data_port=data_port,
        start_layer=info.layers.start if info.layers else 0,
        end_layer=info.layers.end if info.layers else 0,
        data_hosts=info.data_hosts,
        owner=info.owner,
        holder=info.live_owner,
        holder_instance=info.live_owner_process,
        term=info.term,
        instance=info.instance,
        profile=_encode_profile(info.profile),
        stopping=info.stopping,
        slices=[_encode_slice(held) for held in info.slices],
        certificate_begins=info.certificate[0],
        certificate_ends=info.certificate[1],
        problem=problem,
        clock=clock,
    )
    _encode_summary(info, answer)
    return answer


def decode_info(answer: worker_pb2.DescribeResponse, address: str, clock_ahead_seconds: float) -> WorkerInfo:
    """Decode the description that the worker at a control address sent. Raises ``WorkerLost`` if it is implausible."""
    _require_plausible(answer, address)
    host, _ = parse_address(address)
    return WorkerInfo(
        **_decode_summary(answer),
        **_decode_stage(answer, _STAGE),
        control_address=address,
        data_address=format_address(host, answer.data_port),
        clock_ahead_seconds=clock_ahead_seconds,
        cluster=answer.cluster,
        layers=LayerRange(answer.start_layer, answer.end_layer) if answer.epoch else None,
        data_hosts=tuple(answer.data_hosts),
        owner=answer.owner,
        live_owner=answer.holder,
        live_owner_process=answer.holder_instance,
        term=answer.term,
        instance=answer.instance,
        profile=_decode_profile(answer.profile),
        stopping=answer.stopping,
        slices=tuple(_decode_slice(held) for held in answer.slices),
        certificate=(answer.certificate_begins, answer.certificate_ends),
    )


def encode_worker(state: WorkerState) -> cluster_pb2.Worker:
    """Encode a worker as the coordinator sees it."""
    message = cluster_pb2.Worker(
        control_address=state.control_address,
        data_address=state.data_address,
        clock_ahead_seconds=state.clock_ahead_seconds,
        reachable=state.reachable,
        problem=state.problem,
        bandwidth=state.bandwidth,
        standing=state.standing,
        silent_seconds=state.silent_seconds,
        losses=state.losses,
    )
    _encode_summary(state, message)
    return message


def decode_worker(message: cluster_pb2.Worker) -> WorkerState:
    """Decode a worker as the coordinator sees it."""
    return WorkerState(
        **_decode_summary(message),
        control_address=message.control_address,
        data_address=message.data_address,
        clock_ahead_seconds=message.clock_ahead_seconds,
        reachable=message.reachable,
        problem=message.problem,
        bandwidth=message.bandwidth,
        standing=message.standing,
        silent_seconds=message.silent_seconds,
        losses=message.losses,
    )


def _encode_summary(summary: WorkerSummary, message: Summary) -> None:
    for name in _SHARED:
        setattr(message, name, getattr(summary, name))


def _decode_summary(message: Summary) -> dict[str, Any]:
    """Return the arguments of a ``WorkerSummary`` that ``_encode_summary`` has set."""
    values = {name: getattr(message, name) for name in _SHARED}
    return values | {name: _limit(getattr(message, name), most) for name, most in _MOST.items()}


def _limit(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if math.isfinite(value) else 0.0


def _require_plausible(answer: worker_pb2.DescribeResponse, address: str) -> None:
    """Raise ``WorkerLost`` for an implausible description: its values are printed to terminals and used in plans."""
    a = answer
    own = [value for name in _SHARED if isinstance(value := getattr(a, name), str)]
    texts = (*own, *a.adapters, a.cluster, a.fingerprint, a.instance, a.holder, a.owner, a.holder_instance)
    valid = all(text.isprintable() and len(text) <= MAX_FACT_CHARS for text in texts) and a.data_port <= HIGHEST_PORT
    valid = valid and len(a.adapters) <= MAX_ADAPTERS and len(a.data_hosts) <= MAX_DATA_HOSTS
    valid = valid and all(map(is_ip_address, a.data_hosts))
    valid = valid and len(a.slices) <= MAX_SLICES + 1 and all(map(_is_plausible_slice, a.slices))
    if not valid or (a.epoch and a.start_layer >= a.end_layer) or len(a.problem) > MAX_SENTENCE_CHARS:
        raise WorkerLost(f"the process at {address} sent an invalid worker description; is it macpipe?")


def _is_plausible_slice(held: worker_pb2.HeldSlice) -> bool:
    texts = (held.model, held.fingerprint, *held.adapters)
    short = all(text.isprintable() and len(text) <= MAX_FACT_CHARS for text in texts)
    short = short and len(held.adapters) <= MAX_ADAPTERS and len(held.problem) <= MAX_SENTENCE_CHARS
    return short and held.epoch > 0 and held.start_layer < held.end_layer and held.data_port <= HIGHEST_PORT


def _encode_slice(held: HeldSlice) -> worker_pb2.HeldSlice:
    message = worker_pb2.HeldSlice(**{name: getattr(held, name) for name in _SLICE})
    if held.layers:
        message.start_layer, message.end_layer = held.layers.start, held.layers.end
    return message


def _decode_slice(held: worker_pb2.HeldSlice) -> HeldSlice:
    return HeldSlice(**_decode_stage(held, _SLICE), layers=LayerRange(held.start_layer, held.end_layer))


def _decode_stage(message: worker_pb2.DescribeResponse | worker_pb2.HeldSlice, names: Iterable[str]) -> dict[str, Any]:
    """Return the values of fields that describe a stage, without its layers."""
    values = {name: getattr(message, name) for name in names}
    return values | {"adapters": tuple(message.adapters), "ranks": max(message.ranks, 1)}


def _encode_profile(profile: Profile) -> worker_pb2.Profile:
    return worker_pb2.Profile(
        bandwidth=profile.bandwidth,
        layer_s=profile.layer_s,
        step_s=profile.step_s,
        flops=profile.flops,
        row_cost=profile.row_cost,
        corrections=[worker_pb2.Ratio(fingerprint=model, ratio=ratio) for model, ratio in profile.corrections],
        verify_costs=[worker_pb2.VerifyCost(tokens=tokens, cost=cost) for tokens, cost in profile.verify_costs],
    )


def _decode_profile(p: worker_pb2.Profile) -> Profile:
    """Decode a worker's speed. Implausible figures, or too many corrections, count as unknown."""
    if len(p.corrections) > KEPT_CORRECTIONS:
        return Profile()
    figures = (p.bandwidth, p.layer_s, p.step_s, p.flops, p.row_cost, *(c.ratio for c in p.corrections))
    if not all(math.isfinite(f) and f >= 0 for f in figures) or any(c.ratio == 0 for c in p.corrections):
        return Profile()
    learned = tuple((c.fingerprint, c.ratio) for c in p.corrections)
    costs = tuple((c.tokens, c.cost) for c in p.verify_costs)
    if not valid_verify_costs(costs):
        return Profile()
    return Profile(p.bandwidth, p.layer_s, p.step_s, p.flops, p.row_cost, learned, costs)
