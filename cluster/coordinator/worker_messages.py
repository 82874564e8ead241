"""Encode and decode the messages between a coordinator and one worker. What a worker says is checked here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.core.adapter import Adapter
from cluster.core.all_reduce import AllReduce
from cluster.core.limits import MAX_FACT_CHARS
from cluster.core.plan import FetchOrder, LayerRange, Link, StageSpec, StorePlace
from cluster.core.replication_limits import MAX_COPIES
from cluster.core.term_limits import MAX_TERM
from cluster.membership.in_sync import InSyncSet
from cluster.membership.terms import Denial, Process, Term, TermAnswer, TermCall
from cluster.transport.rich_errors import MAX_SENTENCE_BYTES, cut
from cluster.v1 import worker_pb2 as pb

_DENIALS: dict[int, Denial | None] = {pb.TERM_DENIAL_UNSPECIFIED: None} | {
    pb.TermDenial.Value(f"TERM_DENIAL_{denial.name}"): denial for denial in Denial
}


@dataclass(frozen=True, slots=True)
class SumSeat:
    """Rank ``rank`` of ``ranks`` of a group, whose measured sums workers keep under the name ``group``."""

    group: str
    rank: int
    ranks: int


def decode_term_answer(call: TermCall, answer: pb.GrantTermResponse) -> tuple[TermAnswer, str]:
    """Return a worker's answer, and its sentence why not. Raises ``ValueError`` if it is not one of macpipe's."""
    if answer.denial not in _DENIALS or answer.term > MAX_TERM:
        raise ValueError("an unknown denial, or a number that no term has")
    granted = Term(answer.term, Process(answer.coordinator, answer.instance))
    named = InSyncSet(answer.in_sync.term, answer.in_sync.version, tuple(answer.in_sync.replicas[:MAX_COPIES]))
    problem = answer.problem if answer.problem.isprintable() else ""
    found = TermAnswer(call, _DENIALS[answer.denial], granted, named, answer.newest_epoch)
    return found, cut(problem, MAX_SENTENCE_BYTES)


def decode_link(answer: pb.MeasureLinkResponse | pb.LinkStageResponse) -> Link | None:
    """Return the link that a worker measured; None if there is none, or if its figures are impossible."""
    finite = math.isfinite(answer.round_trip_s) and math.isfinite(answer.bandwidth)
    if not finite or answer.round_trip_s < 0 or answer.bandwidth <= 0:
        return None
    interface = answer.interface if answer.interface.isprintable() else ""
    return Link(answer.round_trip_s, answer.bandwidth, interface[:MAX_FACT_CHARS])


def decode_sums(answer: pb.MeasureSumsResponse) -> AllReduce | None:
    """Return how fast a group adds up; None if nothing is known, or if the figures are impossible."""
    found = AllReduce.measured(answer.seconds, answer.bandwidth, disturbed=answer.disturbed)
    return found if found.is_possible else None


def encode_load(spec: StageSpec, order: FetchOrder, coordinator: str, instance: str) -> pb.LoadStageRequest:
    """Return the request for a slice, on behalf of a coordinator's process."""
    return pb.LoadStageRequest(
        epoch=spec.epoch,
        index=spec.index,
        count=spec.count,
        model=spec.model.name,
        path=spec.model.path,
        fingerprint=spec.model.fingerprint,
        start_layer=spec.layers.start,
        end_layer=spec.layers.end,
        max_context=spec.max_context,
        kv_bits=spec.kv_bits,
        weight_bits=spec.weight_bits,
        rank=spec.rank,
        ranks=spec.ranks,
        readers=spec.readers,
        coordinator=coordinator,
        instance=instance,
        tensors=order.tensors,
        deferred=order.deferred,
        peers=encode_peers(order.peers),
        repo=order.repo,
        commit=order.commit,
    )


def encode_adapter(adapter: Adapter, layers: LayerRange) -> pb.StageAdapter:
    """Return an adapter with the names of its tensors that these layers need."""
    ref, tensors = adapter.ref, [tensor.name for tensor in adapter.tensors_of(layers)]
    return pb.StageAdapter(name=ref.name, path=ref.path, fingerprint=ref.fingerprint, tensors=tensors)


def encode_peers(peers: Iterable[StorePlace]) -> list[pb.StorePeer]:
    """Return where a worker may fetch from."""
    return [pb.StorePeer(name=p.name, address=p.address, party=p.party) for p in peers]
