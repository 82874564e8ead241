"""A coordinator dies, or stops, in mid-answer: a standby takes its place, and the same tokens follow."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.client import Client, ClusterState
from cluster.core.errors import AnswerLost, MacpipeError, NotServing, RequestNotFound
from integration.daemons import Cluster, Daemon, free_port, launch, until, wait_serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(300), pytest.mark.xdist_group("faults")]
NAMES = ("ada", "bob", "cyd")
TOKENS = 60
PROMPT = [5, 6, 7]


@dataclass
class Coordinators:
    """Three workers, and coordinators in homes of their own."""

    folder: Path
    cluster: Cluster = field(init=False)
    ports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cluster = Cluster(self.folder, mtls=False)
        workers = {name: free_port() for name in NAMES}
        for name, port in workers.items():
            self.cluster.worker(name, "--port", str(port))
        for daemon in self.cluster.daemons:
            daemon.wait_for("of cluster")
        self.peers = [one for port in workers.values() for one in ("--peer", f"127.0.0.1:{port}")]

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def serve(self, name: str, *options: str) -> Daemon:
        """Start a coordinator, on the port that it had before if it had one."""
        port = self.ports.setdefault(name, free_port())
        home = ["--home", str(self.folder / name), "--cluster", self.cluster.name]
        here = ["--http", "off", "--port", str(port), "--peers-only"]
        return self.cluster._start(name, ["serve", *options, *home, *here], launch)

    def lead(self, name: str) -> Daemon:
        options = ("faq", "--workers", "3", "--wait", "60", "--replicate", "sync", *self.peers)
        return self.serve(name, *options)

    def state(self, name: str) -> ClusterState | None:
        try:
            with Client(self.address(name), timeout_s=5) as client:
                return client.cluster()
        except MacpipeError:
            return None

    def in_sync(self, leader: str) -> int:
        """How many standbys of this leader have all that clients saw."""
        state = self.state(leader)
        standbys = state.leadership.standbys if state and state.leadership else ()
        return sum(one.in_sync for one in standbys)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Coordinators]:
    """A leader, ``lead``, and a standby that is in sync, ``heir``."""
    made = Coordinators(tmp_path)
    try:
        leader = made.lead("lead")
        wait_serving(made.address("lead"), leader)
        made.serve("heir", "--standby", "--coordinator", made.address("lead"))
        until(lambda: made.in_sync("lead") == 1)
        yield made
    finally:
        made.cluster.close()


def undisturbed(pair: Coordinators, name: str = "lead", count: int = TOKENS) -> list[int]:
    with Client(pair.address(name), timeout_s=60) as client:
        return [token.token for token in client.stream(PROMPT, max_tokens=count, ignore_eos=True)]


def interrupted(pair: Coordinators, leader: Daemon, number: int) -> list[int]:
    """The tokens of a client that knows both coordinators, the first of which gets a signal at its tenth token."""
    said = []
    with Client(f"{pair.address('lead')},{pair.address('heir')}", timeout_s=120) as client:
        for token in client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
            said.append(token.token)
            if len(said) == 10:
                leader.process.send_signal(number)
    return said


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait(10)


def leader_of(pair: Coordinators) -> Daemon:
    return named(pair, "lead")


def named(pair: Coordinators, name: str) -> Daemon:
    """Return the last process of a coordinator."""
    return next(daemon for daemon in reversed(pair.cluster.daemons) if daemon.name == name)


def kill(*daemons: Daemon) -> None:
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait(10)


def stand_by(pair: Coordinators, name: str, other: str) -> Daemon:
    return pair.serve(name, "--standby", "--coordinator", pair.address(other))


def read(pair: Coordinators, interrupt: Callable[[], object]) -> list[int]:
    """Return the tokens of a sampled answer whose client knows both coordinators. Call a function at its tenth one."""
    said = []
    with Client(f"{pair.address('lead')},{pair.address('heir')}", timeout_s=120) as client:
        for token in client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True, temperature=0.8, seed=3):
            said.append(token.token)
            if len(said) == 10:
                interrupt()
    return said


def test_an_answer_goes_on_at_a_standby_after_its_leader_was_killed_which_then_stands_by(pair: Coordinators) -> None:
    whole, leader = undisturbed(pair), leader_of(pair)
    assert interrupted(pair, leader, signal.SIGKILL) == whole
    leader.process.wait(10)
    heir = named(pair, "heir")
    assert "reading, 0%" not in heir.said(), "it adopts what the workers hold"
    again = pair.lead("lead")
    until(lambda: pair.in_sync("heir") == 1)
    assert "standing by" in again.said()
    state = pair.state("heir")
    assert state
    assert state.leadership
    assert state.leadership.leader
    assert state.leadership.leader.addresses == (pair.address("heir"),)
    assert state.leadership.term > 1
    heir.process.kill()
    wait_serving(pair.address("lead"), again)
    assert undisturbed(pair) == whole, "and back"


def test_who_was_lost_with_the_leader_s_mac_is_shown_until_it_is_back(pair: Coordinators) -> None:
    kill(leader_of(pair), named(pair, "ada"))

    def lost() -> tuple[list[tuple[str, bool]], list[str]]:
        state = pair.state("heir")
        if state is None or state.leadership is None:
            return [], []
        standbys = [(one.addresses[0], one.silent_seconds > 0) for one in state.leadership.standbys]
        return standbys, [one.name for one in state.workers if one.standing == "gone" and not one.reachable]

    until(lambda: lost() == ([(pair.address("lead"), True)], ["ada"]))
    stand_by(pair, "lead", "heir")
    until(lambda: lost() == ([(pair.address("lead"), False)], ["ada"]))
    assert "leader: stepped down" not in named(pair, "heir").said()


def test_a_leader_that_stops_hands_over_to_its_standby(pair: Coordinators) -> None:
    whole, leader = undisturbed(pair), leader_of(pair)
    assert interrupted(pair, leader, signal.SIGTERM) == whole
    assert leader.process.wait(15) == 0


def test_a_leader_that_is_told_to_hands_over_and_stands_by(pair: Coordinators) -> None:
    """Whichever coordinators a client knows, its answer goes on."""
    count, lead, heir = 400, pair.address("lead"), pair.address("heir")
    whole = undisturbed(pair, count=count)
    with ExitStack() as open_ones, Client(lead, timeout_s=20) as admin:
        with pytest.raises(NotServing, match="no standby named nobody"):
            admin.hand_over("nobody")
        clients = [open_ones.enter_context(Client(known, timeout_s=120)) for known in (f"{lead},{heir}", lead, heir)]
        readers = [iter(client.stream(PROMPT, max_tokens=count, ignore_eos=True)) for client in clients]
        said = [[next(reader).token] for reader in readers]
        assert admin.hand_over().endswith(f":{pair.ports['heir']}")
        for tokens, reader in zip(said, readers, strict=True):
            tokens.extend(token.token for token in reader)
            assert tokens == whole
    until(lambda: pair.in_sync("heir") == 1)
    assert leader_of(pair).process.poll() is None


def test_two_standbys_agree_on_one_leader(pair: Coordinators) -> None:
    pair.serve("third", "--standby", "--coordinator", pair.address("heir"))  # which knows who leads
    until(lambda: pair.in_sync("lead") == 2)
    whole, leader = undisturbed(pair), leader_of(pair)
    assert interrupted(pair, leader, signal.SIGKILL) == whole
    until(lambda: pair.in_sync("heir") + pair.in_sync("third") >= 1)
    led = [state.leadership.leader for name in ("heir", "third") if (state := pair.state(name)) and state.leadership]
    assert len({one.name for one in led if one}) == 1


def test_a_model_that_was_loaded_beside_the_first_one_is_there_at_the_next_leader(pair: Coordinators) -> None:
    with Client(pair.address("lead"), timeout_s=60) as client:
        client.load("faq-draft", name="small", workers=1).wait()
        whole = client.generate(PROMPT, max_tokens=9, model="small").tokens
        loading = iter(client.load("faq", name="third"))
        next(loading)  # it has begun
        time.sleep(0.6)  # for the standby to hear of it
        kill(leader_of(pair))
    heir = named(pair, "heir")
    wait_serving(pair.address("heir"), heir)
    with Client(pair.address("heir"), timeout_s=60) as client:
        until(lambda: {"small", "third"} <= {model.id for model in client.models()})
        assert client.generate(PROMPT, max_tokens=9, model="small").tokens == whole
        assert client.generate(PROMPT, max_tokens=3, model="third").tokens


def test_a_live_leader_keeps_the_lead_beside_two_busy_loops(pair: Coordinators) -> None:
    whole, before = undisturbed(pair), pair.state("lead")
    with busy_loops(2):
        for _ in range(8):
            assert undisturbed(pair) == whole
            time.sleep(2)  # longer than a lease
    after = pair.state("lead")
    assert before
    assert after
    assert before.leadership
    assert after.leadership
    assert after.leadership.term == before.leadership.term
    assert "elected" not in named(pair, "heir").said()


def test_a_standby_that_hangs_holds_tokens_back_until_it_is_left_out_and_comes_back(pair: Coordinators) -> None:
    whole = undisturbed(pair)
    heir = named(pair, "heir")
    said = []
    with Client(pair.address("lead"), timeout_s=120) as client:
        for token in client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
            said.append(token.token)
            if len(said) == 10:
                heir.process.send_signal(signal.SIGSTOP)
    assert said == whole
    assert pair.in_sync("lead") == 0
    heir.process.send_signal(signal.SIGCONT)
    until(lambda: pair.in_sync("lead") == 1)


def test_a_leader_whose_standby_died_too_goes_on_as_a_standby_that_comes_back_first(pair: Coordinators) -> None:
    whole = read(pair, lambda: None)

    def lose_both() -> None:
        kill(named(pair, "heir"), leader_of(pair))
        stand_by(pair, "lead", "heir")

    assert read(pair, lose_both) == whole


def test_a_standby_that_missed_tokens_leaves_the_lead_to_the_leader_that_comes_back_later(pair: Coordinators) -> None:
    whole = read(pair, lambda: None)

    def lose_both() -> None:
        kill(named(pair, "heir"))
        until(lambda: pair.in_sync("lead") == 0)
        with Client(pair.address("lead"), timeout_s=60) as client:
            client.generate(PROMPT, max_tokens=3)  # the leader goes on alone
        kill(leader_of(pair))
        heir = stand_by(pair, "heir", "lead")
        heir.wait_for("standing for election")
        time.sleep(2)
        assert "elected" not in heir.said()
        stand_by(pair, "lead", "heir")

    assert read(pair, lose_both) == whole


def test_a_standby_that_missed_tokens_and_leads_ends_the_old_answers_since_it_lacks_them(pair: Coordinators) -> None:
    with Client(pair.address("lead"), timeout_s=60) as client, pytest.raises(RequestNotFound):
        list(client.resume("nobodys"))

    def lose_both() -> None:
        kill(named(pair, "heir"))
        until(lambda: pair.in_sync("lead") == 0)
        with Client(pair.address("lead"), timeout_s=60) as client:
            client.generate(PROMPT, max_tokens=3)  # the leader goes on alone
        kill(leader_of(pair))
        stand_by(pair, "heir", "lead")

    with pytest.raises(AnswerLost, match="send the request again"):
        read(pair, lose_both)
    assert len(undisturbed(pair, "heir")) == TOKENS


def test_a_leader_that_missed_tokens_stands_by_though_it_is_started_with_its_model(pair: Coordinators) -> None:
    whole = read(pair, lambda: None)
    kill(leader_of(pair))
    wait_serving(pair.address("heir"), named(pair, "heir"))

    def lose_both() -> None:
        kill(named(pair, "heir"))
        lead = pair.lead("lead")
        stand_by(pair, "heir", "lead")  # which may not take over the copy of that leader
        until(lambda: "lacks something" in lead.said() or "following leader" in lead.said())

    assert read(pair, lose_both) == whole, "the answer was accepted by the standby alone"
