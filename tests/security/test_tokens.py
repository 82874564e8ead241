"""Join tokens: redeemed once, for one key, in time, and stored only as a hash."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import (
    Busy,
    ClockWrong,
    DuplicateName,
    InvalidOption,
    InvalidRequest,
    MacpipeError,
    MemberNotFound,
    TokenRefused,
)
from cluster.security.admission import Admission, AdmissionRequest, clocks_in_words
from cluster.security.authority import Authority
from cluster.security.cluster_creation import create_cluster
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request
from cluster.security.limits import MAX_TOKENS
from cluster.security.members import Members
from cluster.security.roles import Role, read_party
from cluster.security.tokens import JoinToken, TokenState, TokenStore, WrongSecret

HOUR, DAY = 3600.0, 86_400.0
IDS = {Role.COORDINATOR: "c" * 16, Role.WORKER: "a" * 16, Role.ADMIN: "d" * 16}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path, clock: Clock) -> ClusterFolder:
    made = ClusterFolder(tmp_path, "lab")
    create_cluster(made, "mac-1", IDS, clock)
    return made


@pytest.fixture
def door(folder: ClusterFolder, clock: Clock) -> Admission:
    return Admission(folder, clock)


def token(door: Admission, role: Role = Role.WORKER, ttl_s: float = HOUR) -> JoinToken:
    return door.tokens.issue(door.authority.fingerprint, role, ttl_s)


def admission_request(
    token: JoinToken, csr: bytes = b"", *, name: str = "mac-2", number: int = 2, clock: float = 1.8e9
) -> AdmissionRequest:
    return AdmissionRequest(token.id, token.secret, csr or make_request()[1], f"{number:016x}", name, clock)


def admitted(door: Admission) -> list[str]:
    return [member.name for member in door.members.current()][3:]


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32), st.sampled_from(list(Role)[1:]))
def test_a_token_reads_as_it_was_written(secret: bytes, fingerprint: bytes, role: Role) -> None:
    one = JoinToken("0a0b0c0d", role, fingerprint, secret)
    assert JoinToken.parse(f" {one.text}\n") == one
    assert len(one.text) == 83
    assert one.text.removeprefix("mpj1.").isalnum()
    assert one.cluster_id == fingerprint.hex()[:16]
    assert secret.hex() not in repr(one)
    assert repr(secret) not in repr(one)


@given(st.one_of(st.text(max_size=300), st.text("mpj1.23456789ABCxyz", min_size=60, max_size=90).map("mpj1.".__add__)))
def test_what_is_no_token_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        JoinToken.parse(text)
    assert len(text.strip()) < 5 or text.strip() not in refused.value.sentence


def test_a_token_that_was_not_copied_right_says_how() -> None:
    text = JoinToken("0a0b0c0d", Role.WORKER, b"f" * 32, b"s" * 16).text
    with pytest.raises(InvalidOption, match="a part of the join token is missing"):
        JoinToken.parse(text[:-1])
    for at in range(5, len(text)):
        wrong = text[:at] + ("2" if text[at] != "2" else "3") + text[at + 1 :]
        with pytest.raises(InvalidOption, match="a character of the join token is wrong"):
            JoinToken.parse(wrong)


def test_a_token_makes_its_bearer_what_it_says(door: Admission) -> None:
    for number, role in enumerate((Role.WORKER, Role.CLIENT, Role.ADMIN, Role.COORDINATOR), 2):
        one = token(door, role)
        assert JoinToken.parse(one.text).role is role
        party = read_party(door.admit(admission_request(one, name=f"mac-{number}", number=number)))
        assert (party.role, party.name, party.id) == (role, f"mac-{number}", f"{number:016x}")
        assert door.members.admits(party)


def test_nothing_of_a_secret_is_kept(door: Admission, folder: ClusterFolder) -> None:
    one = token(door)
    door.admit(admission_request(one))
    for path in folder.path.rglob("*"):
        if path.is_file():
            assert one.secret not in path.read_bytes()
            assert one.secret.hex().encode() not in path.read_bytes()
    assert one.secret.hex() not in repr(door.tokens.all_tokens())


def test_the_same_key_may_ask_again_and_gets_the_same(door: Admission, clock: Clock) -> None:
    one = token(door)
    _, csr = make_request()
    first = door.admit(admission_request(one, csr))
    clock.now += 2 * HOUR
    assert door.admit(admission_request(one, csr, name="renamed", number=9)) == first
    assert admitted(door) == ["mac-2"]


def test_another_key_may_not(door: Admission) -> None:
    one = token(door)
    door.admit(admission_request(one))
    with pytest.raises(TokenRefused, match="was used by mac-2; a token admits one Mac"):
        door.admit(admission_request(one, name="mac-3", number=3))
    assert admitted(door) == ["mac-2"]


def test_a_token_ends(door: Admission, clock: Clock) -> None:
    one = token(door)
    clock.now += HOUR
    with pytest.raises(TokenRefused, match="expired 2027-01-15 09:00 UTC; ask for a new one: `macpipe token create`"):
        door.admit(admission_request(one))
    assert door.tokens.all_tokens()[0].state(clock.now) is TokenState.EXPIRED
    for ttl in (0.0, 59.0, 8 * DAY, float("nan")):
        with pytest.raises(InvalidOption, match="1 minute to 7 days"):
            token(door, ttl_s=ttl)


def test_a_revoked_token_admits_nobody_and_throws_nobody_out(door: Admission) -> None:
    unused, used = token(door), token(door)
    _, csr = make_request()
    door.admit(admission_request(used, csr))
    for one in (unused, used):
        assert door.tokens.revoke(one.id).revoked is not None
        with pytest.raises(TokenRefused, match="was revoked"):
            door.admit(admission_request(one, csr))
    assert admitted(door) == ["mac-2"]
    with pytest.raises(MemberNotFound, match="no join token ffffffff"):
        door.tokens.revoke("ffffffff")


def test_a_guess_learns_nothing(door: Admission, tmp_path: Path, clock: Clock) -> None:
    """Whether the id is unknown, its secret is wrong, or it is another cluster's: one and the same sentence."""
    mine = token(door)
    other = ClusterFolder(tmp_path / "other", "lab")
    create_cluster(other, "mac-9", IDS, clock)
    foreign = token(Admission(other, clock))
    said = set()
    for guess in (JoinToken(mine.id, mine.role, b"f" * 32, b"0" * 16), JoinToken("0" * 8, mine.role, b"f" * 32, b"s")):
        with pytest.raises(WrongSecret) as refused:
            door.admit(admission_request(guess))
        said.add(refused.value.sentence)
    with pytest.raises(WrongSecret) as refused:
        door.admit(admission_request(foreign))
    assert said == {refused.value.sentence}
    assert admitted(door) == []


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"name": "mac-1"}, DuplicateName),
        ({"name": "../x"}, InvalidOption),
        ({"csr": b"nonsense"}, InvalidRequest),
        ({"clock": 1.8e9 - 25 * HOUR}, ClockWrong),
        ({"clock": 1.8e9 + 91 * DAY}, ClockWrong),
    ],
)
def test_a_refusal_for_another_reason_leaves_the_token(
    door: Admission, bad: dict[str, object], error: type[MacpipeError]
) -> None:
    one = token(door)
    with pytest.raises(error):
        door.admit(admission_request(one, **bad))  # type: ignore[arg-type]
    assert door.tokens.all_tokens()[0].used is None
    door.admit(admission_request(one))
    assert admitted(door) == ["mac-2"]


def test_a_crash_between_the_two_writes_lets_nobody_else_in(door: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    one = token(door)
    _, csr = make_request()

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Members, "admit", crash)
        with pytest.raises(KeyboardInterrupt):
            door.admit(admission_request(one, csr))
    assert admitted(door) == []
    with pytest.raises(TokenRefused, match="was used by mac-2"):
        door.admit(admission_request(one, name="mac-3", number=3))
    party = read_party(door.admit(admission_request(one, csr)))
    assert admitted(door) == ["mac-2"]
    assert door.members.admits(party)


def test_who_was_removed_does_not_come_back_by_the_old_token(door: Admission) -> None:
    one = token(door)
    _, csr = make_request()
    door.admit(admission_request(one, csr))
    door.members.remove("mac-2")
    with pytest.raises(TokenRefused, match="mac-2 was removed from the cluster; ask for a new token"):
        door.admit(admission_request(one, csr))
    door.admit(admission_request(token(door), csr))
    assert admitted(door) == ["mac-2"]


def test_tokens_have_a_bound_and_are_forgotten(door: Admission, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.security.tokens.MAX_TOKENS", 3)
    assert MAX_TOKENS > 3
    for _ in range(3):
        token(door)
    with pytest.raises(Busy, match="there are 3 join tokens already"):
        token(door)
    clock.now += HOUR + DAY
    token(door)
    assert len(door.tokens.all_tokens()) == 1


def test_a_cluster_is_made_whole_or_not_at_all(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ClusterFolder(tmp_path, "lab")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ClusterFolder, "keep", crash)
        with pytest.raises(KeyboardInterrupt):
            create_cluster(folder, "mac-1", IDS, clock)
    assert not folder.exists
    assert list(folder.path.parent.iterdir()) == []
    made = create_cluster(folder, "mac-1", IDS, clock)
    assert [(p.role.value, p.name) for p in made.parties] == [
        ("coordinator", "mac-1-coordinator"),
        ("worker", "mac-1"),
        ("admin", "mac-1-admin"),
    ]
    for party in made.parties:
        ring = folder.keyring(party.role, party.name)
        assert isinstance(ring, Keyring)
        assert ring.party == party
        assert Members(folder).admits(party)
    with pytest.raises(InvalidOption, match="already leads a cluster named lab; `macpipe token create`"):
        create_cluster(folder, "mac-1", IDS, clock)
    folder.authority_key.unlink()
    with pytest.raises(InvalidOption, match="is already in a cluster named lab; choose another name"):
        create_cluster(folder, "mac-1", IDS, clock)
    with pytest.raises(InvalidOption, match="--name"):
        create_cluster(ClusterFolder(tmp_path, "b"), "m" * 60, IDS, clock)


def test_two_who_found_at_once_make_one_cluster(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ClusterFolder(tmp_path, "lab")
    make = Authority.make
    first: list[str] = []

    def late(draft: ClusterFolder, now: float) -> Authority:
        if not first:
            first.append("begun")
            first.append(create_cluster(folder, "mac-1", IDS, clock).cluster_id)
        return make(draft, now)

    monkeypatch.setattr(Authority, "make", late)
    with pytest.raises(InvalidOption, match="already"):
        create_cluster(folder, "mac-2", IDS, clock)
    assert Authority.load(folder).cluster_id == first[1]
    assert [member.name for member in Members(folder).current()][1] == "mac-1"


@pytest.mark.parametrize(
    ("ahead", "words"),
    [(600, "10 min ahead of"), (-45, "45 s behind"), (-7200, "2 h behind"), (3 * DAY, "3 days ahead of")],
)
def test_clocks_in_words(ahead: float, words: str) -> None:
    assert clocks_in_words(ahead) == words


def test_tokens_of_all_processes_are_one_list(folder: ClusterFolder, clock: Clock) -> None:
    here, there = TokenStore(folder, clock), TokenStore(folder, clock)
    one = here.issue(b"f" * 32, Role.CLIENT)
    assert [t.id for t in there.all_tokens()] == [one.id]
    there.revoke(one.id)
    assert here.all_tokens()[0].state(clock.now) is TokenState.REVOKED
