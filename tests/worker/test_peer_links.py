"""The best of several links between two workers is taken by what was measured, and the next best when it fails."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.core.errors import LinkFailed, Unreachable
from cluster.core.plan import Link
from cluster.security.credentials import LocalTrust
from cluster.security.trust import Trust
from cluster.worker import peer_links
from cluster.worker.peer_links import PeerLinks, choose_shared
from cluster.worker.profile_file import ProfileFile

WIFI, CABLE, SLOW = "10.0.0.9:7000", "10.1.0.9:7000", "10.2.0.9:7000"
SPEEDS = {WIFI: Link(0.003, 8e7), CABLE: Link(0.0004, 3e9), SLOW: Link(0.0002, 1e8)}


class Network:
    """What can be reached, and what was measured and pulled from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up = dict(SPEEDS)
        self.measured: list[str] = []
        self.pulled: list[str] = []
        self.refusing: set[str] = set()
        monkeypatch.setattr(peer_links, "measure_link", self.measure)
        monkeypatch.setattr(peer_links, "find_own_address", lambda address: "10.0.0.1" * (address in self.up))

    def measure(self, trust: Trust, address: str, peer: str) -> Link:
        assert peer == "worker.w"
        self.measured.append(address)
        if address not in self.up:
            raise Unreachable("no")
        return self.up[address]

    async def pull(self, address: str) -> None:
        self.pulled.append(address)
        if address not in self.up or address in self.refusing:
            raise LinkFailed(f"no answer from {address}")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> ProfileFile:
    return ProfileFile(tmp_path / "profile.json", "k")


@pytest.fixture
def links(file: ProfileFile) -> PeerLinks:
    return PeerLinks(LocalTrust(), file)


@pytest.mark.anyio
async def test_the_best_link_is_chosen_by_what_was_measured(network: Network, links: PeerLinks) -> None:
    best = await links.measure("w", WIFI, [SLOW, CABLE], afresh=False)
    assert (best.round_trip_s, best.bandwidth) == (0.0004, 3e9)
    assert network.measured == [WIFI, SLOW, CABLE]
    assert await links.pull("w", WIFI, [SLOW, CABLE], network.pull) == best
    assert network.pulled == [CABLE]


@pytest.mark.anyio
async def test_only_what_is_new_or_asked_for_is_measured_again(network: Network, links: PeerLinks) -> None:
    await links.measure("w", WIFI, [], afresh=False)
    best = await links.measure("w", WIFI, [CABLE], afresh=False)
    assert best.address == CABLE
    assert network.measured == [WIFI, CABLE]
    network.up[CABLE] = Link(0.1, 1e6)
    again = await links.measure("w", WIFI, [CABLE], afresh=False)
    assert (again, again.address) == (best, CABLE)
    assert (await links.measure("w", WIFI, [CABLE], afresh=True)).bandwidth == 8e7


@pytest.mark.anyio
async def test_an_address_that_cannot_be_reached_costs_no_measurement(network: Network, links: PeerLinks) -> None:
    del network.up[CABLE]
    assert (await links.measure("w", WIFI, [CABLE], afresh=False)).bandwidth == 8e7
    assert network.measured == [WIFI]
    network.up.clear()
    with pytest.raises(Unreachable):
        await links.measure("w", SLOW, [CABLE], afresh=False)


@pytest.mark.anyio
@pytest.mark.parametrize("cut", ["the cable", "its streams"])
async def test_a_link_that_fails_gives_way_to_the_next_and_is_measured_again(
    cut: str, network: Network, links: PeerLinks, file: ProfileFile
) -> None:
    await links.measure("w", WIFI, [CABLE, SLOW], afresh=False)
    if cut == "the cable":
        del network.up[CABLE]
    else:
        network.refusing.add(CABLE)
    used = await links.pull("w", WIFI, [CABLE, SLOW], network.pull)
    assert used
    assert used.bandwidth == 1e8
    assert network.pulled == ([SLOW] if cut == "the cable" else [CABLE, SLOW])
    assert file.link("w", CABLE) is None
    assert file.link("w", WIFI)
    network.up, network.refusing = dict(SPEEDS), set()
    assert (await links.measure("w", WIFI, [CABLE, SLOW], afresh=False)).bandwidth == 3e9


@pytest.mark.anyio
async def test_links_that_were_not_measured_come_last(network: Network, links: PeerLinks) -> None:
    assert await links.pull("w", WIFI, [CABLE], network.pull) is None
    assert network.pulled == [WIFI]
    del network.up[WIFI]
    assert await links.pull("w", WIFI, [CABLE], network.pull) is None
    assert network.pulled == [WIFI, CABLE]


@pytest.mark.anyio
async def test_if_no_link_works_the_error_says_so_and_nothing_is_forgotten(
    network: Network, links: PeerLinks, file: ProfileFile
) -> None:
    await links.measure("w", WIFI, [CABLE], afresh=False)
    network.up.clear()
    with pytest.raises(LinkFailed, match=WIFI):
        await links.pull("w", WIFI, [CABLE], network.pull)
    assert network.pulled == [WIFI]
    assert file.link("w", CABLE)


def test_only_addresses_of_a_common_subnet_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_links, "shared_hosts", lambda hosts, local: [h for h in hosts if not h.startswith("192")])
    others = [f"10.{n}.0.9:7000" for n in range(8)]
    assert choose_shared(WIFI, ["192.168.1.9:7000", WIFI, *others[1:]]) == others[1:4]


def test_a_real_connection_tells_this_machines_own_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert peer_links.find_own_address(f"127.0.0.1:{server.getsockname()[1]}") == "127.0.0.1"
