"""The authority moves to another coordinator's Mac: encrypted for that one alone, and never usable on both."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.core.errors import AuthorityElsewhere, Forbidden, InvalidOption, InvalidRequest, MemberNotFound
from cluster.security.authority import Authority, find_holder
from cluster.security.authority_move import AuthorityReceiver, find_target, give_up_authority, seal_authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.members import Member, Members
from cluster.security.roles import Party, Role
from cluster.security.tokens import TokenStore
from parties import Lead

FIRST, SECOND = "c1" * 8, "c2" * 8


class Pair:
    """A cluster with two coordinators: the first made it, the second has a copy of the roster."""

    def __init__(self, home: Path) -> None:
        self.lead = Lead.make(home / "first")
        self.first = self.lead.folder
        self.second = ClusterFolder(home / "second", "default")
        self.sender = self.lead.admit(Role.COORDINATOR, "mac-1-coordinator", FIRST)
        self.lead.admit(Role.COORDINATOR, "mac-2-coordinator", SECOND, self.second.home)
        self.copy_roster()
        self.receiver = AuthorityReceiver(self.second)

    def copy_roster(self) -> None:
        self.second.write(self.second.members, self.first.members.read_bytes())

    @property
    def target(self) -> Member:
        return find_target(self.first, "mac-2")

    def send(self, sender: Party | None = None) -> None:
        sealed = seal_authority(self.first, self.target, self.receiver.offer())
        self.receiver.receive(sender or self.sender, sealed)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_after_the_move_the_other_mac_admits(pair: Pair) -> None:
    token = TokenStore(pair.first).issue(pair.lead.authority.fingerprint, Role.WORKER)
    spent = TokenStore(pair.first).issue(pair.lead.authority.fingerprint, Role.WORKER)
    TokenStore(pair.first).revoke(spent.id)
    pair.send()
    give_up_authority(pair.first, pair.target)
    assert Authority.load(pair.second).fingerprint == pair.lead.authority.fingerprint
    assert [one.id for one in TokenStore(pair.second).all_tokens()] == [token.id], "open tokens go along"
    assert pair.second.authority_key.stat().st_mode & 0o777 == 0o600
    assert not pair.first.authority_key.exists()
    with pytest.raises(AuthorityElsewhere, match=r"is on the Mac of mac-2-coordinator.*first certificate ends 20\d\d-"):
        Authority.load(pair.first)
    assert find_holder(pair.second).here


def test_a_move_that_was_interrupted_can_be_repeated(pair: Pair) -> None:
    pair.send()
    pair.copy_roster()  # the leader, which does not know of it, replicates its own
    with pytest.raises(AuthorityElsewhere, match="mac-1-coordinator"):
        Authority.load(pair.second)
    Authority.load(pair.first)
    pair.send()
    Members(pair.first).name_authority_holder(SECOND)
    assert pair.first.holds_authority
    with pytest.raises(AuthorityElsewhere, match="mac-2-coordinator"):
        Authority.load(pair.first)
    give_up_authority(pair.first, pair.target)
    Authority.load(pair.second)


def test_the_holder_neither_gives_it_to_itself_nor_deletes_it_for_itself(pair: Pair) -> None:
    holder, itself = Members(pair.first).authority_holder(), AuthorityReceiver(pair.first)
    assert holder
    with pytest.raises(Forbidden, match="cannot move it to itself"):
        itself.receive(pair.sender, seal_authority(pair.first, holder, itself.offer()))
    with pytest.raises(InvalidOption, match="mac-1-coordinator is this Mac's own coordinator"):
        give_up_authority(pair.first, holder)
    Authority.load(pair.first)


def test_only_the_holder_may_send_it_and_only_to_the_one_it_is_for(pair: Pair, tmp_path: Path) -> None:
    sealed = seal_authority(pair.first, pair.target, pair.receiver.offer())
    other = pair.lead.admit(Role.COORDINATOR, "mac-3-coordinator", "c3" * 8, tmp_path / "third")
    admin = pair.lead.admit(Role.ADMIN, "mac-1-admin", FIRST)
    for sender in (other, admin):
        with pytest.raises(Forbidden, match="mac-1-coordinator holds the authority"):
            pair.receiver.receive(sender, sealed)
    for wrong in (b"", b"x" * 500, sealed[:-1]):
        pair.receiver.offer()
        with pytest.raises(InvalidRequest, match="encrypted for this coordinator"):
            pair.receiver.receive(pair.sender, wrong)
    holder = Members(pair.first).authority_holder()
    assert holder
    for_first = seal_authority(pair.first, holder, pair.receiver.offer())
    with pytest.raises(InvalidRequest, match="encrypted for this coordinator"):
        pair.receiver.receive(pair.sender, for_first)
    assert not pair.second.authority_key.exists()


def test_an_offer_is_good_once_and_for_a_minute(pair: Pair) -> None:
    now = [0.0]
    receiver = AuthorityReceiver(pair.second, lambda: now[0])
    sealed = seal_authority(pair.first, pair.target, receiver.offer())
    receiver.receive(pair.sender, sealed)
    pair.copy_roster()
    with pytest.raises(InvalidRequest, match="expired"):
        receiver.receive(pair.sender, sealed)
    sealed = seal_authority(pair.first, pair.target, receiver.offer())
    now[0] = 61.0
    with pytest.raises(InvalidRequest, match="expired"):
        receiver.receive(pair.sender, sealed)
    with pytest.raises(InvalidRequest, match="cannot be used"):
        seal_authority(pair.first, pair.target, b"short")


def test_a_key_of_another_cluster_is_not_stored(pair: Pair, tmp_path: Path) -> None:
    other = Lead.make(tmp_path / "other")
    pair.first.write(pair.first.authority_key, other.folder.authority_key.read_bytes())
    pair.first.write(pair.first.authority, other.folder.authority.read_bytes())
    with pytest.raises(MemberNotFound, match="no coordinator of this cluster is named mac-9"):
        find_target(pair.first, "mac-9")
    with pytest.raises(Exception, match="belongs to another cluster"):
        pair.send()
    assert not pair.second.authority_key.exists()
