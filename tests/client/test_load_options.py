"""Options of a load: what the client sends is what the coordinator orders."""

from __future__ import annotations

import pytest

from cluster.api.grpc.cluster_service import _load_order
from cluster.client.proto_encoding import encode_load
from cluster.core.errors import InvalidRequest
from cluster.core.plan import Speculation


def test_guesses_change_no_bit_unless_a_load_allows_it() -> None:
    assert _load_order(encode_load("m", {})).exact
    assert _load_order(encode_load("m", {"exact": True})).exact
    order = _load_order(encode_load("m", {"exact": False, "speculate": "ngram"}))
    assert (order.exact, order.speculation) == (False, Speculation.NGRAM)
    with pytest.raises(InvalidRequest, match="exact"):
        encode_load("m", {"exact": "off"})  # type: ignore[typeddict-item]
