"""What a leader serves survives its way to a standby, whatever options it has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.journal import Fsync
from cluster.coordinator.lost_workers import KnownWorker
from cluster.coordinator.replicated_service import ReplicatedService
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import InvalidOption
from cluster.core.leadership import Replicate
from cluster.core.plan import LayerRange, Objective, Route, Speculation

ORDER = LoadOrder(
    "org/model",
    3,
    (LayerRange(0, 4), LayerRange(4, 6)),
    Route.RELAY,
    max_context=4096,
    wait_s=2.5,
    objective=Objective.THROUGHPUT,
    speculation=Speculation.DRAFT,
    exact=False,
    draft="small",
    adapters=(("a", "/adapters/a"), ("b", "/adapters/b")),
)


def test_a_service_is_read_as_it_was_written() -> None:
    entry = ModelEntry("large", ORDER, ("one", "two*"), True, 60.0, None, 3, "small")
    service = ReplicatedService(
        (entry, ModelEntry("small", LoadOrder("faq"))),
        ("large",),
        ("10.0.0.2:7000", "[fd00::2]:7000"),
        Fsync.SECOND,
        Replicate.SYNC,
        max_schema_bytes=9,
        load_wait_s=1.5,
        strict=True,
        known=(KnownWorker("1", "ada", "10.0.0.2:7000"),),
        guests=(ModelEntry("guest", LoadOrder("faq-draft")), ModelEntry("unloaded", LoadOrder("faq"))),
    )
    assert ReplicatedService.decode(service.encode()) == service
    assert [guest.name for guest in replace(service, loaded=("large", "guest")).loaded_guests] == ["guest"]
    assert ReplicatedService.decode(replace(service, journal=None, replicate=None).encode()).journal is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"models": 3}', b'{"models": [{"name": "a"}]}'])
def test_what_is_no_service_is_refused_with_what_to_do(content: bytes) -> None:
    with pytest.raises(InvalidOption, match="install the same version of macpipe on both Macs"):
        ReplicatedService.decode(content)
