"""Coordinators and workers in simulated time, which run the product's own records, candidates and leaderships.

Clocks drift, machines pause and sleep, processes crash, disks fill up, networks lose, delay and cut one way. Engines
compute frames of rings, so that a frame computed for a wrong term is seen. ``Flaws`` break the rules one at a time, to
prove that the simulation would notice.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise

from cluster.core.limits import HEARTBEAT_S
from cluster.membership.candidacy import LeaderCandidate
from cluster.membership.leadership import Leadership
from cluster.membership.term_record import TermRecord
from cluster.membership.terms import NO_TERM, Denial, Process, Term, TermAnswer, TermCall, TermRequest

TICK_S = 0.25
SETTLED_S = 3.0
"""After which the two that led at first, each on workers of its own, know of each other."""
CHAOS_S = 20.0
BOUND_S = 20.0
"""After the last fault, who can lead must lead within this: some rounds of asking, with back-off between them."""
DRIFT = 0.04
FRAME_S = 5.0
"""After which a frame that did not come back breaks its ring; so does the end of a worker's process, at once."""
LOAD_S = 2.0
"""After which a load that is not complete is begun anew."""
STEP_S = (0.005, 0.02, 0.05, 0.6, 4.0)
"""How long the step of an engine may take."""
_STEPS = (8, 8, 8, 1, 0.5)
_FAULTS = ("pause", "sleep", "crash", "mac", "nap", "halves", "alone", "links", "disk", "loss")
Act = Callable[[], None]


class Violation(AssertionError):
    """A rule was broken."""


@dataclass(frozen=True)
class Flaws:
    """Rules that are left out."""

    sync: bool = False
    """A grant is answered before it is on disk."""
    wait: bool = False
    """A restarted worker does not wait for a lease."""
    margin: bool = False
    """A leader counts a lease as long as its worker does. (Set ``LEASE_MARGIN_S`` to 0 for it.)"""
    fence: bool = False
    """A grant is answered while the engine goes on."""
    floor: bool = False
    """A new term's epoch need not be larger than the epochs before."""
    streams: bool = False
    """Streams open for an epoch, whatever its term."""
    sleep: bool = False
    """Clocks stop while a machine sleeps."""
    lock: bool = False
    """A restarted worker does not wait for the last step of the engine before."""

    @staticmethod
    def names() -> list[str]:
        return [flaw.name for flaw in fields(Flaws)]


class World:
    """One run of a seed. With ``calm``, machines only pause as beside busy programs, and no leader may change."""

    def __init__(self, seed: int, flaws: Flaws | None = None, *, calm: bool = False) -> None:
        self.rng, self.flaws, self.calm = random.Random(seed), flaws or Flaws(), calm
        self.now = 0.0
        self._events: list[tuple[float, int, Act]] = []
        self._count = 0
        self.cut: set[tuple[str, str]] = set()
        self.loss = 0.0
        sizes = [self.rng.choice((1, 1, 2)) for _ in range(self.rng.choice((2, 3, 4)))]
        self.needed = self.rng.randint(max(sizes), sum(sizes))
        self.sizes = {f"w{i}": size for i, size in enumerate(sizes)}
        self.workers = {name: SimWorker(self, name) for name in self.sizes}
        self.coordinators = {f"c{i}": SimCoordinator(self, f"c{i}") for i in range(self.rng.choice((2, 2, 3)))}
        self.led: list[tuple[float, Term]] = []
        """When which leader said that it leads."""
        self.frames = 0
        frequent = self.rng.sample(_FAULTS, 2)
        self._weights = [3.0 if fault in frequent else 0.3 for fault in _FAULTS]

    def fits(self, workers: frozenset[str]) -> bool:
        return sum(self.sizes[name] for name in workers) >= self.needed

    def at(self, when: float, act: Act) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, act))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = until

    def send(self, source: Node, target: Node, act: Act) -> None:
        """Deliver a message to ``target``, unless it is lost. A machine that sleeps gets it when it wakes."""
        if (source.name, target.name) in self.cut or (self.loss and self.rng.random() < self.loss):
            return
        delay = self.rng.uniform(0.001, 0.03)
        if not self.calm and self.rng.random() < 0.03:
            delay += self.rng.random()
        self.at(self.now + delay, lambda: target.when_awake(act))

    def play(self) -> None:
        """Play faults, then wait for those who can lead. Raises ``Violation``."""
        nodes = [*self.workers.values(), *self.coordinators.values()]
        for node in nodes:
            node.boot()
        for _ in range(self.rng.randint(8, 24)):
            self.at(self.rng.uniform(0.5, CHAOS_S), self._pause if self.calm else self._strike)
        self.run(CHAOS_S)
        self.loss = 0.0
        self._choose_last_cuts()
        for node in nodes:
            node.recover()
        while unled := self._unled():
            if self.now > CHAOS_S + BOUND_S:
                raise Violation(f"{unled} could lead, and does not")
            self.run(self.now + 0.5)
        if self.calm and len({term for when, term in self.led if when > SETTLED_S}) > 1:
            raise Violation(f"a living leader was replaced: {self.led}")

    def _pause(self) -> None:
        node = self.rng.choice([*self.workers.values(), *self.coordinators.values()])
        node.pause(self.rng.uniform(0.05, 0.5))

    def _strike(self) -> None:
        node = self.rng.choice([*self.workers.values(), *self.coordinators.values()])
        (fault,) = self.rng.choices(_FAULTS, self._weights)
        match fault:
            case "pause":
                self._pause()
            case "sleep":
                node.pause(self.rng.uniform(0.3, 8.0), asleep=True)
            case "crash":
                self._crash(node)
            case "mac":
                for name in (self.rng.choice(list(self.workers)), self.rng.choice(list(self.coordinators))):
                    self._crash(self.workers.get(name) or self.coordinators[name])
            case "nap":
                self._nap(
                    self.rng.choice(list(self.workers.values())), self.rng.choice(list(self.coordinators.values()))
                )
            case "halves":
                names = [*self.workers, *self.coordinators]
                near = {name for name in names if self.rng.random() < 0.5}
                self._cut_for({(a, b) for a in near for b in names if b not in near})
            case "alone":
                self._cut_for({pair for pair in self._pairs() if node.name in pair})
            case "links":
                self._cut_for({pair for pair in self._pairs() if self.rng.random() < 0.3})
            case "disk":
                full = self.rng.choice(list(self.workers.values()))
                full.disk_full = True
                self.at(self.now + 1.5, full.free_disk)
            case "loss":
                self.loss = self.rng.choice((0.0, 0.1, 0.4))

    def _nap(self, worker: SimWorker, coordinator: SimCoordinator) -> None:
        """Have a worker crash again and again while a coordinator, which perhaps loads its slice anew, falls asleep."""
        self._crash(worker)
        asleep_at = self.now + self.rng.uniform(0.3, 1.5)
        self.at(asleep_at, lambda: coordinator.pause(self.rng.uniform(2.5, 8.0), asleep=True))
        self.at(asleep_at + self.rng.uniform(0.1, 1.0), lambda: self._crash(worker))

    def _crash(self, node: Node) -> None:
        node.crash()
        self.at(self.now + self.rng.choice((0.05, 0.3, 2.5)), node.recover)

    def _pairs(self) -> list[tuple[str, str]]:
        names = [*self.workers, *self.coordinators]
        return [(a, b) for a in names for b in names if a != b]

    def _cut_for(self, pairs: set[tuple[str, str]]) -> None:
        """Cut these ways for a while, or both ways between the same two."""
        if self.rng.random() < 0.5:
            pairs |= {(b, a) for a, b in pairs}
        self.cut |= pairs
        self.at(self.now + self.rng.uniform(0.3, 4.0), lambda: self.cut.difference_update(pairs))

    def _choose_last_cuts(self) -> None:
        """Heal the network, or leave some cuts for good."""
        self.run(CHAOS_S + 4.0)
        self.cut = set()
        if not self.calm and self.rng.random() < 0.4:
            self.cut = {pair for pair in self._pairs() if self.rng.random() < 0.15}

    def _unled(self) -> str:
        """Return the coordinator that could lead but neither leads nor hears a leader; "" for none."""
        leading = [c for c in self.coordinators.values() if c.leads]
        taken = {c.name: c.leadership.workers for c in leading if c.leadership}
        for one in self.coordinators.values():
            others = frozenset[str]().union(*(held for name, held in taken.items() if name != one.name))
            reached = frozenset(w for w in self.workers if not {(one.name, w), (w, one.name)} & self.cut)
            hears = any((other.name, one.name) not in self.cut for other in leading if other is not one)
            if not one.leads and not hears and self.fits(reached - others):
                return one.name
        rivals = [c.name for c in leading if any((o.name, c.name) not in self.cut for o in leading if o.above(c))]
        return f"one above {rivals[0]}" if rivals else ""


class Node:
    """A process on a machine with a clock of its own."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.life, self.alive = 0, False
        self._rate = 1 + DRIFT * world.rng.choice((-1, 1, 0, world.rng.uniform(-1, 1)))
        self._offset = world.rng.uniform(0, 1000)
        self._paused_until = -math.inf
        self._lost_s = 0.0

    def clock(self) -> float:
        return self._offset + (self.world.now - self._lost_s) * self._rate

    @property
    def awake(self) -> bool:
        return self.alive and self.world.now >= self._paused_until

    def pause(self, seconds: float, *, asleep: bool = False) -> None:
        self._paused_until = max(self._paused_until, self.world.now + seconds)
        if asleep and self.world.flaws.sleep:
            self._lost_s += seconds

    def when_awake(self, act: Act) -> None:
        """Do it now, or once the machine is awake again. A process that is gone does nothing."""
        if not self.alive:
            return
        if self.awake:
            act()
        else:
            self.world.at(self._paused_until, lambda: self.when_awake(act))

    def later(self, seconds: float, act: Act) -> None:
        life = self.life
        self.world.at(self.world.now + seconds, lambda: self.when_awake(lambda: act() if self.life == life else None))

    def crash(self) -> None:
        self.alive = False
        self.life += 1

    def recover(self) -> None:
        self._paused_until = min(self._paused_until, self.world.now)
        if not self.alive:
            self.boot()

    def boot(self) -> None:
        self.alive = True


@dataclass(eq=False)
class SimStage:
    """A loaded slice, and who reads its frames: the next worker, and the life of its process."""

    term: Term
    epoch: int
    reader: str = ""
    reader_life: int = 0


@dataclass
class SimFrame:
    """A frame, with the truth about its term, which no stage looks at."""

    term: Term
    epoch: int
    number: int
    passed: list[tuple[str, Term]] = field(default_factory=list)


class SimWorker(Node):
    """A worker: its record, its disk, and an engine that does one step after the other."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self._disk: Term | None = None
        self._granted_to: dict[int, Process] = {}
        self._fenced = 0
        """The highest number that was granted and answered, which nothing may be computed below any more."""
        self._steps: dict[Term, float] = {}
        """Until when something computes for a term on this machine: of this process, or of the one before."""
        self.disk_full = False

    def boot(self) -> None:
        super().boot()
        self.record = TermRecord(self._disk, self.clock)
        if self.world.flaws.wait:
            self.record.give_back(self.record.term)
        self.stage: SimStage | None = None
        self._newest = self._floor = 0
        self._free_at = -math.inf
        self._orphan_until = -math.inf if self.world.flaws.lock else max(self._steps.values(), default=-math.inf)

    def free_disk(self) -> None:
        self.disk_full = False

    def serve_term_call(self, call: TermCall, reply: Callable[[TermAnswer], None]) -> None:
        def answer(denial: Denial | None) -> None:
            reply(TermAnswer(call, denial, self.record.term))

        match call.request:
            case TermRequest.ASK:
                answer(self.record.why_not(call.term.process))
            case TermRequest.RENEW:
                answer(self.record.renew(call.term))
            case TermRequest.RETURN:
                self.record.give_back(call.term)
            case TermRequest.GRANT:
                self._grant(call, answer)

    def _grant(self, call: TermCall, answer: Callable[[Denial | None], None]) -> None:
        if call.term != self.record.term and self.world.now < self._orphan_until:
            answer(Denial.BUSY)
        elif denial := self.record.begin(call.term):
            answer(denial)
        elif call.term == self.record.term:
            answer(self.record.finish(written=True))
        else:
            self.later(self.world.rng.uniform(0.001, 0.02), lambda: self._written(call, answer))

    def _written(self, call: TermCall, answer: Callable[[Denial | None], None]) -> None:
        if self.disk_full:
            answer(self.record.finish(written=False))
        elif self.world.flaws.sync:
            self.later(1.0, lambda: self._keep(call.term))
            self._granted(answer)
        else:
            self._keep(call.term)
            self._granted(answer)

    def _keep(self, term: Term) -> None:
        self._disk = term

    def _granted(self, answer: Callable[[Denial | None], None]) -> None:
        self.record.finish(written=True)
        self._floor = self._newest
        if self.world.flaws.fence:
            self._confirm(answer)
        else:
            self.stage = None
            self.later(max(0.0, self._free_at - self.world.now), lambda: self._confirm(answer))

    def _confirm(self, answer: Callable[[Denial | None], None]) -> None:
        term = self.record.term
        if self._granted_to.setdefault(term.number, term.process) != term.process:
            raise Violation(f"{self.name} granted {term.number} twice")
        if older := [known for known, until in self._steps.items() if known < term and until > self.world.now]:
            raise Violation(f"{self.name} granted {term.number} and computes for {older[0].number}")
        self._fenced = max(self._fenced, term.number)
        answer(None)

    def load(self, term: Term, epoch: int, reply: Callable[[int], None]) -> None:
        """Load a slice. ``reply`` gets 0, or a number that the epoch must exceed."""
        floor = 0 if self.world.flaws.floor else self._floor
        if term != self.record.term or epoch <= floor or (epoch < self._newest and not self.world.flaws.floor):
            reply(self._newest or 1)
            return
        self._newest = max(self._newest, epoch)
        self.later(self.world.rng.choice((0.01, 0.1, 1.0)), lambda: self._loaded(term, epoch, reply))

    def _loaded(self, term: Term, epoch: int, reply: Callable[[int], None]) -> None:
        if term != self.record.term:
            reply(self._newest)
            return
        self.stage = SimStage(term, epoch)
        reply(0)

    def link(self, term: Term, epoch: int, before: SimWorker, reply: Act) -> None:
        if self._holds(term, epoch):
            self.world.send(self, before, lambda: before.open(term, epoch, self, reply))

    def open(self, term: Term, epoch: int, reader: Node | None, reply: Act) -> None:
        """Open a stream: a feed without a reader, else a pull by the reader."""
        if self._holds(term, epoch) and self.stage:
            if reader:
                self.stage.reader, self.stage.reader_life = reader.name, reader.life
            reply()

    def _holds(self, term: Term, epoch: int) -> bool:
        stage = self.stage
        return bool(stage and stage.epoch == epoch and (stage.term == term or self.world.flaws.streams))

    def receive(self, frame: SimFrame) -> None:
        """Take a frame from a stream. Only its epoch is known here."""
        if (stage := self.stage) and stage.epoch == frame.epoch:
            self.later(max(0.0, self._free_at - self.world.now), lambda: self._compute(stage, frame))

    def _compute(self, stage: SimStage, frame: SimFrame) -> None:
        if self.stage is not stage:
            return
        if stage.term.number < self._fenced:
            raise Violation(f"{self.name} computes for {stage.term.number} after {self._fenced}")
        if beside := [t for t, until in self._steps.items() if t != stage.term and until > self.world.now]:
            raise Violation(f"{self.name} computes for {stage.term.number} beside {beside[0].number}")
        if frame.term != stage.term:
            raise Violation(f"{self.name} computes a frame of {frame.term.number} for {stage.term.number}")
        (seconds,) = self.world.rng.choices(STEP_S, _STEPS)
        self._free_at = self._steps[stage.term] = self.world.now + seconds
        self.later(seconds, lambda: self._pass_on(stage, frame))

    def _pass_on(self, stage: SimStage, frame: SimFrame) -> None:
        if self.stage is not stage:
            return
        frame.passed.append((self.name, stage.term))
        reader = self.world.workers.get(stage.reader) or self.world.coordinators.get(stage.reader)
        if reader:  # a stream ends with the process of its reader
            life = stage.reader_life
            self.world.send(self, reader, lambda: reader.receive(frame) if reader.life == life else None)


class SimCoordinator(Node):
    """A coordinator: stands, leads, and sends frames around a ring of its workers."""

    def boot(self) -> None:
        super().boot()
        world = self.world
        process = Process(self.name, f"{self.name}.{self.life}")
        rng = random.Random(world.rng.random())
        self._candidate = LeaderCandidate(process, world.workers.keys(), world.fits, self.clock, rng.random)
        self._epoch, self._ring, self._awaited = 0, tuple[SimWorker, ...](), 0
        self._told_at = self._sent_at = -math.inf
        self._number, self._term, self._lives = 0, NO_TERM, list[int]()
        self._ready = self._waits = False
        self.later(world.rng.uniform(0, TICK_S), self._tick)

    @property
    def leadership(self) -> Leadership | None:
        return self._candidate.leadership if self.alive else None

    @property
    def leads(self) -> bool:
        return self.awake and self.leadership is not None and self.leadership.leads

    def above(self, other: SimCoordinator) -> bool:
        mine, theirs = self.leadership, other.leadership
        return bool(mine and theirs and mine.term > theirs.term)

    def _tick(self) -> None:
        self._send(self._candidate.step())
        overdue = self._waits and self.world.now - self._sent_at > (FRAME_S if self._ready else LOAD_S)
        if overdue or (self._ready and [worker.life for worker in self._ring] != self._lives):
            self._reconnect()
        if self._ready and not self._waits:
            self._send_frame()
        if self.leads and self.leadership:
            if not (self._ready or self._waits) or not self._covered_by(self.leadership):
                self._load_ring(self.leadership)
            if self.world.now - self._told_at >= HEARTBEAT_S:
                self._told_at = self.world.now
                self._tell(self.leadership.term)
        self.later(TICK_S, self._tick)

    def _reconnect(self) -> None:
        """Open the streams of a broken ring once more, as if nothing had happened; after that, it is loaded anew."""
        again, self._ready, self._waits = self._ready, False, False
        if again:
            self._open_ring(self._term, self._epoch)

    def _covered_by(self, leadership: Leadership) -> bool:
        return self._term == leadership.term and {worker.name for worker in self._ring} <= leadership.workers

    def _tell(self, term: Term) -> None:
        self.world.led.append((self.world.now, term))
        for other in self.world.coordinators.values():
            if other is not self:
                self.world.send(self, other, lambda other=other: other.see(term))

    def see(self, term: Term) -> None:
        self._send(self._candidate.see(term))

    def _send(self, calls: list[TermCall]) -> None:
        life = self.life
        for call in calls:
            worker = self.world.workers[call.worker]

            def reply(answer: TermAnswer, worker: SimWorker = worker) -> None:
                self.world.send(worker, self, lambda: self._take(answer) if self.life == life else None)

            self.world.send(self, worker, lambda w=worker, c=call, r=reply: w.serve_term_call(c, r))

    def _take(self, answer: TermAnswer) -> None:
        self._send(self._candidate.on_answer(answer))
        for other in self.world.coordinators.values():
            if other is self or not other.awake or not self.leadership or not other.leadership:
                continue
            if both := self.leadership.held & other.leadership.held:
                raise Violation(f"{self.name} and {other.name} both say that they hold {sorted(both)}")

    def _send_frame(self) -> None:
        """Send a frame around the ring, as long as nothing shows that it broke: a leader does not ask its clock."""
        self._number += 1
        self._wait()
        first, frame, life = self._ring[0], SimFrame(self._term, self._epoch, self._number), self._lives[0]
        self.world.send(self, first, lambda: first.receive(frame) if first.life == life else None)

    def _wait(self) -> None:
        self._waits, self._sent_at = True, self.world.now

    def _load_ring(self, leadership: Leadership) -> None:
        names = sorted(leadership.held)
        self.world.rng.shuffle(names)
        while self.world.fits(frozenset(names[1:])):
            del names[0]
        self._ring = tuple(self.world.workers[name] for name in names)
        self._epoch = max(self._epoch + 1, 100 * int(self.world.now / 10))  # coarse, so that two choose the same
        self._term = leadership.term
        self._ready, self._awaited = False, len(names)
        self._wait()
        term, epoch, life = leadership.term, self._epoch, self.life

        def reply(worker: SimWorker, least: int) -> None:
            self.world.send(worker, self, lambda: self._loaded(term, epoch, least) if self.life == life else None)

        for worker in self._ring:
            self.world.send(self, worker, lambda w=worker: w.load(term, epoch, lambda least: reply(w, least)))

    def _loaded(self, term: Term, epoch: int, least: int) -> None:
        if epoch != self._epoch:
            return
        if least:
            self._epoch = max(self._epoch, least)
            return
        self._awaited -= 1
        if not self._awaited:
            self._open_ring(term, epoch)

    def _open_ring(self, term: Term, epoch: int) -> None:
        self._wait()
        ring, self._awaited = self._ring, len(self._ring) + 1
        for before, worker in pairwise(ring):
            opened = self._opened_by(before, epoch)
            self.world.send(self, worker, lambda w=worker, b=before, o=opened: w.link(term, epoch, b, o))
        first, last = self._opened_by(ring[0], epoch), self._opened_by(ring[-1], epoch)
        self._lives = [worker.life for worker in ring]
        self.world.send(self, ring[0], lambda: ring[0].open(term, epoch, None, first))
        self.world.send(self, ring[-1], lambda: ring[-1].open(term, epoch, self, last))

    def _opened_by(self, worker: SimWorker, epoch: int) -> Act:
        life = self.life
        return lambda: self.world.send(worker, self, lambda: self._opened(epoch) if self.life == life else None)

    def _opened(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._awaited -= 1
            self._ready = self._awaited == 0
            self._waits = not self._ready

    def receive(self, frame: SimFrame) -> None:
        """Take a frame that went around the ring."""
        if frame.epoch != self._epoch or frame.number != self._number:
            return
        if {term for _, term in frame.passed} != {frame.term}:
            raise Violation(f"a ring of {frame.term.number} mixes terms: {frame.passed}")
        self.world.frames += 1
        self._waits = False
