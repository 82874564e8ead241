"""Options of a load: what the client sends is what the coordinator orders."""

from __future__ import annotations

import pytest

from cluster.api.grpc.cluster_service import _load_order
from cluster.client.proto_encoding import encode_load, encode_plan
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidRequest
from cluster.core.plan import Speculation

FIRST = LoadOrder("first")


def test_a_load_keeps_the_context_and_the_step_that_the_coordinator_was_started_with() -> None:
    first = LoadOrder("first", max_context=49_152, max_step_ms=30.0)
    for request in (encode_load("m", {}), encode_plan("m", {})):
        order = _load_order(request, first)
        assert (order.max_context, order.default_context, order.max_step_ms) == (None, 49_152, 30.0)
    order = _load_order(encode_load("m", {"max_context": 512, "max_step_ms": 5.0}), first)
    assert (order.max_context, order.max_step_ms) == (512, 5.0)
    assert _load_order(encode_load("m", {}), FIRST).default_context == 4096


def test_guesses_change_no_bit_unless_a_load_allows_it() -> None:
    assert _load_order(encode_load("m", {}), FIRST).exact
    assert _load_order(encode_load("m", {"exact": True}), FIRST).exact
    order = _load_order(encode_load("m", {"exact": False, "speculate": "ngram"}), FIRST)
    assert (order.exact, order.speculation) == (False, Speculation.NGRAM)
    with pytest.raises(InvalidRequest, match="exact"):
        encode_load("m", {"exact": "off"})  # type: ignore[typeddict-item]
