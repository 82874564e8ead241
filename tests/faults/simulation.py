"""Seeds in one process: the real service, heartbeat, recovery and engine loop over simulated Macs.

The Macs apply the frames that they get over a simulated network, describe themselves, load, crash, hang and come back.
Only model bytes and gRPC are replaced. Time is simulated too (``simulated_time``), and waits are at most a tenth of the
real ones.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cluster import __version__
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.draft_assignment import assign_draft
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.planner import make_plan
from cluster.coordinator.recovery import ServiceDeps
from cluster.coordinator.replan import Assignment
from cluster.coordinator.roster import Roster
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.service import ModelService
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.timeline import Timeline
from cluster.coordinator.weight_distribution import WeightDelivery, WeightDistribution
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import (
    BadFrame,
    LinkFailed,
    MacpipeError,
    NotServing,
    StaleEpoch,
    Unreachable,
    WorkerLost,
    WorkerRefused,
)
from cluster.core.frames import Compute, Drop, Edit, Frame, Join, Leave, Restore, Sample, Save, Step, Tensor, Trim
from cluster.core.plan import (
    FetchOrder,
    LoadedStage,
    LoadProgress,
    ModelRef,
    ModelShape,
    Plan,
    Speculation,
    StageSpec,
)
from cluster.core.request import Accepted, FinishEvent, Request, SamplingParams, TokenEvent
from cluster.core.worker import WorkerInfo
from cluster.discovery.sighting import Sighting
from cluster.discovery.sighting_table import SightingTable as Sightings
from cluster.discovery.static import static_source
from cluster.membership.suspicion import Belief, Suspicion
from cluster.membership.terms import TermAnswer, TermCall
from cluster.security.credentials import LocalTrust
from cluster.store.store import FoundModel
from cluster.transport.streams import Line
from cluster.wire.frame_codec import decode, encode
from faults.checker import STATUS_S, Verdict, check
from faults.history import History
from faults.scenario import ORDERLY, Asked, Fault, Kind, Moment, Scenario, pool, scenario
from faults.simulated_time import Box, Port, SimulatedNetwork, simulated_now
from scheduler.stages import continuation, next_token

NAMES = ("ada", "bob", "cyd", "dee")
STAGES = 3
DEADLINE_S = 30.0
BACK_S = 0.2
"""After which a worker that was killed, stopped or drained is there again."""
LEAVE_S = 1.5
"""After which a worker that was told to stop goes, wherever its layers are."""
STATUS_EVERY_S = 0.02
ENGINE_S = 0.03
ENDED = "the engine was ended by SIGKILL"
SPEED = {
    "cluster.coordinator.heartbeat.HEARTBEAT_S": 0.05,
    "cluster.coordinator.heartbeat.LOOK_S": 0.02,
    "cluster.coordinator.heartbeat.GONE_S": 0.25,
    "cluster.coordinator.heartbeat.ASK_S": 0.5,
    "cluster.coordinator.heartbeat.STATUS_ASK_S": 0.1,
    "cluster.coordinator.service.HEARTBEAT_S": 0.05,
    "cluster.coordinator.draft_service.DRAFT_RETRY_S": 0.1,
    "cluster.coordinator.recovery.RECOVERY_PAUSE_S": 0.01,
    "cluster.coordinator.recovery.RETURN_S": 0.5,
}
"""What a test sets before it plays: waits, shortened."""
SHAPE = ModelShape(
    model=ModelRef("sim", "", "f" * 64),
    layers=6,
    layer_bytes=(1000,) * 6,
    cache_bytes=(1000,) * 6,
    shared=(),
    clean_cuts=(1, 2, 3, 4, 5),
    unclean=(),
    max_context=512,
    vocabulary=1000,
)


class Caches:
    """The caches of one stage: all tokens of every sequence, of which the next token is a function."""

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self.boxes = {line: Box(spec.epoch) for line in Line}
        self._fed: dict[int, tuple[int, ...]] = {}
        self._prefixes: dict[int, tuple[int, ...]] = {}
        self._sampled: dict[int, tuple[int, int]] = {}
        self._numbers = 0

    def follows(self, frame: Frame) -> bool:
        """Whether it is the next one. TCP loses nothing in the middle: where something is missing, the stream broke."""
        self._numbers += 1
        return frame.number == self._numbers - 1

    def stepped(self, frame: Frame) -> Frame:
        for edit in frame.edits:
            self._apply(edit)
        if frame.void or (frame.step and frame.step.guesses and self._is_void(frame.step)):
            void = replace(frame, tensors=(), void=True)
            return replace(void, edits=(), step=None) if self.spec.last else void
        rows = []
        for sequence, tokens in zip(frame.step.sequences, frame.step.tokens, strict=True) if frame.step else ():
            self._fed[sequence] += tokens
            rows.append(self._fed[sequence])
        mine = Tensor("int64", (1,), hash(tuple(rows)).to_bytes(8, "little", signed=True))
        agreed = self.spec.first or not rows or bytes(frame.tensors[0].data) == bytes(mine.data)
        if not self.spec.last:
            return replace(frame, tensors=(mine,) if rows and agreed else ())
        samples: list[Sample] = []
        if frame.step and frame.step.drafts > 1:
            samples += self._draft(frame.step)
        elif frame.step and frame.step.compute is Compute.DECODE:
            for sequence, row in zip(frame.step.sequences, rows, strict=True):
                samples += self._sample(frame.step, sequence, row, agreed)
        return replace(frame, edits=(), step=None, tensors=(), samples=tuple(samples))

    def _sample(self, step: Step, sequence: int, row: tuple[int, ...], agreed: bool) -> list[Sample]:
        found: list[Sample] = []
        for at in range(len(row) - step.sampled + 1, len(row) + 1):
            token = next_token(row[:at]) if agreed else 99  # the stages do not hold the same
            found.append(Sample(sequence, 0, token))
            self._sampled[sequence] = at, token
            if row[at : at + 1] != (token,):
                break
        return found

    def _draft(self, step: Step) -> tuple[Sample, ...]:
        """Feed each sample back, but for the last."""
        (sequence,), row = step.sequences, self._fed[step.sequences[0]]
        said = continuation(row, step.drafts)
        self._fed[sequence] += tuple(said[:-1])
        return tuple(Sample(sequence, len(row) + i, token) for i, token in enumerate(said))

    def _is_void(self, step: Step) -> bool:
        """Whether a guess follows a void one, or is known to be wrong. What is void may arrive as such, or not."""
        (sequence,), ((token, *_),) = step.sequences, step.tokens
        follows_void = (step.start or 0) > len(self._fed[sequence])
        wrong = self.spec.last and self._sampled.get(sequence) != (step.start, token)
        return step.guessed and (follows_void or wrong)

    def _apply(self, edit: Edit) -> None:
        match edit:
            case Join():
                self._fed[edit.sequence] = ()
            case Leave():
                del self._fed[edit.sequence]
            case Trim():
                self._fed[edit.sequence] = self._fed[edit.sequence][: edit.length]
            case Save():
                self._prefixes[edit.prefix] = self._fed[edit.sequence]
            case Restore():
                self._fed[edit.sequence] = self._prefixes[edit.prefix][: edit.length]
            case Drop():
                del self._prefixes[edit.prefix]

    def close(self) -> None:
        for box in self.boxes.values():
            box.close()


class Mac(Port):
    """A simulated worker: ``WorkerControl``'s calls, and a data port in the network."""

    def __init__(self, name: str, network: SimulatedNetwork, sightings: Sightings | None = None) -> None:
        self.name, self._network, self._sightings = name, network, sightings
        self.address = self._data = f"{name}:1"
        self._life = 1
        self.leaving: asyncio.Task[None] | None = None
        self._caches: Caches | None = None
        self._problem, self._dead, self._silent = "", False, False
        self.newest = 0
        """The epoch that its engine holds and its daemon does not know of."""
        self.draining, self.loading = False, asyncio.Event()
        self.loading.set()  # unless a test holds loads back
        network.ports[self._data] = self
        self._announce()

    def _announce(self) -> None:
        if self._sightings:
            self._sightings.put(self.name, Sighting(self.address, self.name, self.name, "", "sim"))

    # The data port

    def outbox(self, epoch: int, line: Line, reader: int = 0) -> Box | None:
        caches = self._caches
        return caches.boxes[line] if caches and caches.spec.epoch == epoch else None

    def received(self, message: bytes) -> None:
        caches = self._caches
        if caches is None:
            return
        try:
            frame = decode(message)
        except BadFrame:
            caches.close()
            return
        if frame.epoch != caches.spec.epoch:
            return
        if caches.follows(frame):
            caches.boxes[Line.URGENT].send(encode(caches.stepped(frame)))
        else:
            caches.close()

    # The control port

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        await self._reached(timeout_s)
        return self.info(), self._problem

    async def _reached(self, timeout_s: float = 1.0) -> None:
        if self._dead:
            raise WorkerRefused(f"worker {self.name} refused", worker=self.name)
        if self._silent:
            await asyncio.sleep(timeout_s)
            raise WorkerLost(f"worker {self.name} does not answer", worker=self.name)
        await asyncio.sleep(0)

    def info(self) -> WorkerInfo:
        held = self._caches.spec if self._caches else None
        return WorkerInfo(
            id=self.name,
            name=self.name,
            version=__version__,
            cluster="sim",
            control_address=self.address,
            data_address=self._data,
            chip="",
            backend="",
            mlx_version=f"0 mlx-lm {version('mlx-lm')}",
            memory_total=10**6,
            memory_limit=10**6,
            epoch=held.epoch if held else 0,
            layers=held.layers if held else None,
            fingerprint=held.model.fingerprint if held else "",
            owner="me",
            draining=self.draining or self.leaving is not None,
            stopping=self.leaving is not None,
            instance=str(self._life),
        )

    async def request_term(self, call: TermCall) -> tuple[TermAnswer, str]:
        await self._reached()
        return TermAnswer(call, None, call.term), ""

    async def load(
        self, spec: StageSpec, order: FetchOrder, keep: Sequence[int], memory_limit: int
    ) -> AsyncIterator[LoadProgress | LoadedStage]:
        await self._reached()
        if self._problem:
            raise WorkerLost(f"worker {self.name}: {self._problem}", worker=self.name)
        yield LoadProgress(self.name, spec.layers, 0, 1)
        await asyncio.sleep(0.005)
        await self.loading.wait()
        await self._reached()
        if self._problem:
            raise WorkerLost(f"worker {self.name}: {self._problem}", worker=self.name)
        if spec.epoch < max(self.newest, self._caches.spec.epoch if self._caches else 0):
            raise StaleEpoch("asked to load an old epoch", worker=self.name, epoch=str(self.newest))
        if self._caches:
            self._caches.close()
        self._caches = Caches(spec)
        yield LoadedStage(self.name, ())

    async def link(self, epoch: int, before: WorkerInfo | None, reader: int = 0) -> None:
        await self._reached()
        caches = self._caches
        if caches is None or caches.spec.epoch != epoch:
            raise StaleEpoch(f"worker {self.name} holds no stage of epoch {epoch}")
        try:
            for line in Line if before else ():
                self._network.pull(before.data_address, epoch, self.received, lambda why: caches.close(), line)
        except (Unreachable, StaleEpoch) as e:
            raise LinkFailed(e.sentence) from e

    async def unload(self, epoch: int, timeout_s: float, keep: Sequence[int]) -> None:
        await self._reached()
        if self._caches and self._caches.spec.epoch <= epoch:
            self._drop()

    async def send_step_time_ratio(self, fingerprint: str, ratio: float) -> None:
        await self._reached()

    async def reset(self, why: str, epoch: int) -> None:
        await self._reached()
        self.crash()

    def _drop(self) -> None:
        caches, self._caches = self._caches, None
        if caches:
            caches.close()

    # What can happen to it

    def strike(self, kind: Kind) -> None:
        match kind:
            case Kind.KILL_ENGINE | Kind.CRASH_ENGINE | Kind.ABORT_ENGINE:
                self.crash()
            case Kind.STOP_ENGINE:
                self._problem = "its engine has not answered"
                self._swallow()
            case Kind.KILL_WORKER:
                self._dead = True
                self._drop()
                self._later(BACK_S, self.revive)
            case Kind.STOP_WORKER | Kind.CUT | Kind.CUT_ONE_WAY:
                self._silent = True
                self._swallow()
                self._later(0.1, lambda: self._network.cut(self._data))  # keepalive finds it
                self._later(2 * BACK_S, self.revive)
            case Kind.DELAY | Kind.THROTTLE:
                self._network.delays_s[self._data] = 0.002
                self._later(BACK_S, self.revive)
            case Kind.CORRUPT:
                self._network.faults[self._data] = self._damaged
            case Kind.RESET:
                self._network.cut(self._data)
            case Kind.LEAVE_WORKER | Kind.LEAVE_SPARE:
                if self.leaving is None and not self._dead:
                    self.leaving = asyncio.create_task(self._leave(for_good=kind is Kind.LEAVE_SPARE))
            case Kind.DRAIN_WORKER:
                self.draining = True
                self._later(BACK_S, self._undrain)

    async def _leave(self, *, for_good: bool) -> None:
        """Go once it holds nothing, with a goodbye; come back after a while, at another address if it is announced."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await asyncio.sleep(0.06)  # a heartbeat, after which its coordinator knows
                while self._caches:
                    await asyncio.sleep(0.01)
        self._dead = True
        self._drop()
        if self._sightings:
            self._sightings.forget(self.name)
        if for_good:
            return
        await asyncio.sleep(BACK_S)
        self._life, self.leaving, self._problem = self._life + 1, None, ""
        self.address = f"{self.name}:{self._life}" if self._sightings else self.address
        self.revive()
        self._announce()

    def _undrain(self) -> None:
        self.draining = False

    def wall(self) -> None:
        """Block its data port, as a firewall does, while its daemon reports that all is well."""
        self._network.ports.pop(self._data, None)
        self._network.cut(self._data)

    def crash(self) -> None:
        self._problem = ENDED
        self._network.faults.pop(self._data, None)
        self._drop()
        self._later(ENGINE_S, self._engine_back)

    def _engine_back(self) -> None:
        if self._problem == ENDED:  # else it was stopped as soon as it was there
            self._problem = ""

    def revive(self) -> None:
        """Bring it back. A stopped Mac continues with its caches, but not with its old streams."""
        if self._silent:
            self._network.cut(self._data)
        self._dead = self._silent = False
        self._network.faults.pop(self._data, None)
        self._network.delays_s.pop(self._data, None)

    def _swallow(self) -> None:
        self._network.faults[self._data] = lambda message: None

    def _damaged(self, message: bytes) -> bytes:
        self._network.faults.pop(self._data, None)
        return message[:-1] + bytes([message[-1] ^ 4])

    def _later(self, after_s: float, what: Any) -> None:
        asyncio.get_running_loop().call_later(after_s, what)


class _Nobody:
    """The former address of a worker that has another one now."""

    def __init__(self, address: str) -> None:
        self._refusal = WorkerRefused(f"nobody answers at {address}")

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        await asyncio.sleep(0)
        raise self._refusal

    async def unload(self, epoch: int, timeout_s: float, keep: Sequence[int]) -> None:
        raise self._refusal


class _Macs(Roster):
    def __init__(self, macs: dict[str, Mac], sightings: Sightings | None) -> None:
        source = sightings or static_source([m.address for m in macs.values()])
        super().__init__(source, "sim", "me", LocalTrust())
        self._macs = macs

    def control(self, address: str) -> WorkerClient:
        there = (m for m in self._macs.values() if m.address == address)
        return cast(WorkerClient, next(there, None) or _Nobody(address))


class _Unchecked(WeightDelivery):
    async def check(self, stages: Sequence[LoadedStage], waiting: Any) -> None:
        """There are no bytes to compare."""


class _NoBytes(WeightDistribution):
    def __init__(self) -> None:
        """There is no store."""

    @asynccontextmanager
    async def delivery(self, plan: Plan, model_info: ModelInfo, workers: Sequence[WorkerInfo]) -> Any:
        yield _Unchecked((FetchOrder(()),) * len(plan.stages), cast(Any, SimpleNamespace(known={})), cast(Any, None))


class _Words:
    eos: frozenset[int] = frozenset()

    def encode(self, text: str) -> tuple[int, ...]:
        return (1, 2)

    def decoder(self) -> _Words:
        return self

    def add(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


@dataclass
class Simulation:
    """One fleet that runs one scenario. With ``drafted``, its spare has a draft model, which guesses all tokens."""

    played: Scenario
    asked: tuple[Asked, ...]
    drafted: bool = False

    def __post_init__(self) -> None:
        self.history = History(clock=simulated_now)
        self._network = SimulatedNetwork(random.Random(self.played.seed))
        self.epochs = EpochNumbers(clock=lambda: round(simulated_now() * 1e9))
        self.timeline = Timeline()
        self._sightings = Sightings() if self.played.announced else None
        self.macs = {name: Mac(name, self._network, self._sightings) for name in NAMES}
        self._struck, self._over = asyncio.Event(), False

    async def play(self) -> Verdict:
        await self.open()
        status = asyncio.create_task(self._ask_status())
        try:
            async with asyncio.timeout(DEADLINE_S):
                tasks = [self._request(i) for i in range(len(self.played.requests))]
                await asyncio.gather(*tasks, *map(self._second, self.played.faults[1:]))
        except TimeoutError:
            self.history.note("over")  # whoever has not ended by now hangs
        finally:
            await self._recovered()
            if leaving := [m.leaving for m in self.macs.values() if m.leaving]:
                await asyncio.wait(leaving, timeout=2 * LEAVE_S)
            self._over = True
            await asyncio.wait((status,), timeout=STATUS_S + STATUS_EVERY_S)
            status.cancel()
            await asyncio.wait((status,), timeout=1.0)
            await self.close()
        expected = {
            f"r{i}": continuation(self.asked[r].prompt, self.asked[r].max_tokens)
            for i, r in enumerate(self.played.requests)
        }
        return check(self.history, expected, DEADLINE_S)

    async def _recovered(self) -> None:
        """Wait for the recovery.

        Answers end as soon as the new ring completes them, the recovery only with its canary.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                while self.service.recovery:
                    await asyncio.sleep(0.01)

    async def _ask_status(self) -> None:
        """Call status continuously, as people do, and once more at the end."""
        last = False
        while not last:
            last = self._over
            await asyncio.sleep(STATUS_EVERY_S)
            began = simulated_now()
            try:
                await self._heartbeat.wait_for_answers()
            finally:
                self.history.note("status", took_s=simulated_now() - began, error="")

    async def close(self) -> None:
        await self._heartbeat.close()
        await self.service.close(NotServing("the simulation is over"))

    async def open(self) -> None:
        """Until a token has gone through every stage."""
        roster, order = _Macs(self.macs, self._sightings), LoadOrder("sim", worker_count=STAGES)
        self._heartbeat = HeartbeatMonitor(roster, self._believed, lambda: self.service.alive())
        self._heartbeat._suspicion = Suspicion(suspect_s=0.12, gone_s=0.25)
        workers = tuple(self.macs[name].info() for name in NAMES[:STAGES])
        first = Assignment(make_plan(self.epochs.next(), SHAPE, workers, order), workers)
        model_info = ModelInfo(SHAPE, cast(Any, _Words()), cast(Any, None), FoundModel(Path()), cast(Any, None))
        view = RosterView(roster, "sim")
        means = ServiceDeps(view, self._heartbeat, self._network, _NoBytes(), self.epochs, timeline=self.timeline)
        draft = None
        if self.drafted:
            order = replace(order, speculation=Speculation.DRAFT, draft="draft")
            draft_info = replace(model_info, shape=replace(SHAPE, model=ModelRef("draft", "", "d" * 64)))
            everyone = [mac.info() for mac in self.macs.values()]
            draft = assign_draft(self.epochs.next(), model_info, draft_info, everyone, [w.name for w in workers])
        self.service = ModelService(means, model_info, order, first, lambda said: None, draft)
        self._heartbeat.start()
        await self.service.open(lambda progress: None)
        self._homes = [s.worker for s in self.service.plan.stages]

    def gone(self, name: str) -> bool:
        """Whether the coordinator believes that."""
        return self._heartbeat.is_gone(name)

    def _believed(self, belief: Belief) -> None:
        self.service.on_belief(belief)

    async def _request(self, i: int) -> None:
        asked, name = self.asked[self.played.requests[i]], f"r{i}"
        await asyncio.sleep(self.played.starts[i] / 10)
        self.history.note("sent", request=name)
        answer = AnswerQueue(self.service.loop.post)
        self.service.loop.submit(Request(name, asked.prompt, SamplingParams(), asked.max_tokens), answer)
        try:
            async for event in answer:
                self._seen(name, event, first=i == 0)
        except MacpipeError as e:
            self.history.note("error", request=name, reason=e.reason, sentence=e.sentence)
        if i == 0:
            self._strike_first()

    def _seen(self, name: str, event: Accepted | TokenEvent | FinishEvent, *, first: bool) -> None:
        fault = self.played.faults[0]
        if isinstance(event, Accepted):
            self.history.note("accepted", request=name)
            if first and fault.moment is Moment.PREFILL:
                self._strike_first()
        elif isinstance(event, TokenEvent):
            self.history.note("token", request=name, index=event.index, token=event.token)
            if first and event.index >= fault.token:
                self._strike_first()
        else:
            self.history.note("finish", request=name, reason=str(event.reason))

    def _strike_first(self) -> None:
        if not self._struck.is_set():
            self._struck.set()
            self._strike(self.played.faults[0])

    def _strike(self, fault: Fault) -> None:
        mac = self._homes[min(fault.stage, STAGES - 1)]
        if fault.kind is Kind.LEAVE_SPARE:
            mac = next(name for name in NAMES if name not in self._homes)
        self.history.note("fault", what=f"{fault.kind} {mac}")
        self.macs[mac].strike(fault.kind)

    async def _second(self, fault: Fault) -> None:
        """Strike in the middle of the recovery from the first loss."""
        await self._struck.wait()
        if self.played.faults[0].kind in ORDERLY:
            await asyncio.sleep(0.01 * (self.played.seed % 16))
            self._strike(fault)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self.service.recovery is None:
                    await asyncio.sleep(0.002)
                await asyncio.sleep(0.004 * (self.played.seed % 8))
                self._strike(fault)


async def simulated(
    seeds: Sequence[int], at_once: int = 8, *, drafted: bool = False
) -> dict[int, tuple[Verdict, History]]:
    """Return the verdict on each seed. Raises AssertionError if an error on the event loop was lost."""
    asked, turns = pool(700), asyncio.Semaphore(at_once)
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))

    async def one(seed: int) -> tuple[int, tuple[Verdict, History]]:
        async with turns:
            simulation = Simulation(scenario(seed, asked, STAGES), asked, drafted)
            return seed, (await simulation.play(), simulation.history)

    outcomes = dict(await asyncio.gather(*map(one, seeds)))
    gc.collect()  # tasks tell of an error that nobody looked at when they are let go
    assert not unheard, unheard
    return outcomes
