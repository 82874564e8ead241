"""The roster: the workers that answered, not merely the addresses that were announced.

An announcement is a hint; a worker counts once it has described itself over its control port and is of this cluster
and this version.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import anyio

from cluster import __version__
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import DuplicateId, DuplicateName, MacpipeError, NoWorkers, VersionMismatch
from cluster.core.limits import DESCRIBE_TIMEOUT_S, RESTART_S, SETTLE_S
from cluster.core.worker import WorkerInfo
from cluster.discovery.sighting import Source
from cluster.security.trust import WORKER, Trust

COPIED: Final = (
    "the state folder of one was copied from the other. Stop one of them, or start it with --home or MACPIPE_HOME set "
    "to a folder of its own"
)
MLX_LM: Final = version("mlx-lm")
"""Read once: it is compared with every heartbeat, and takes a millisecond to find."""


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """A worker that was seen: what it says of itself, or why it does not count."""

    facts: WorkerInfo
    problem: str = ""
    reachable: bool = True
    duplicate: bool = False
    """Another living worker has its id, which is its problem."""


class Roster:
    """The workers of one cluster, found through ``source``. ``trust`` knows who was admitted."""

    def __init__(self, source: Source, cluster: str, coordinator: str, trust: Trust) -> None:
        self._source, self._cluster, self._coordinator = source, cluster, coordinator
        self.instance = secrets.token_hex(8)
        self.trust = trust
        self._refreshing = anyio.Lock()
        self._controls: dict[str, WorkerClient] = {}
        self._pinned: dict[str, WorkerInfo] = {}
        self.members: tuple[RosterEntry, ...] = ()

    def pin(self, workers: Sequence[WorkerInfo]) -> None:
        """Keep asking these, who hold a stage, even where they are announced no more; in place of any before."""
        self._pinned = {w.control_address: w for w in workers}

    async def refresh(self) -> tuple[RosterEntry, ...]:
        """Ask everybody who is announced, at once, to describe themselves; members by name."""
        async with self._refreshing:  # another's view of who is announced must not close what this one talks to
            return await self._refresh()

    async def _refresh(self) -> tuple[RosterEntry, ...]:
        addresses = self.addresses()
        answers: dict[str, RosterEntry] = {}
        async with anyio.create_task_group() as tasks:
            for address in addresses:
                tasks.start_soon(self._ask, address, answers)
        await self._forget(self._controls.keys() - addresses)
        by_worth = sorted(answers.values(), key=lambda m: m.reachable)
        unique = {(m.facts.id or m.facts.control_address, m.facts.instance): m for m in by_worth}
        ordered = sorted(unique.values(), key=lambda m: (m.facts.name, m.facts.id, m.facts.control_address))
        self.members = _with_duplicates(ordered)
        return self.members

    def addresses(self) -> set[str]:
        """Where workers may be: what is announced, and who holds a stage."""
        return self._pinned.keys() | {s.address for s in self._source.current()}

    async def _ask(self, address: str, answers: dict[str, RosterEntry]) -> None:
        try:
            facts, problem = await self.control(address).describe(DESCRIBE_TIMEOUT_S)
        except MacpipeError as e:
            known = self._pinned.get(address) or _stranger(address)
            answers[address] = RosterEntry(known, e.sentence, reachable=False)
        else:
            answers[address] = self.member(facts, problem)

    def member(self, facts: WorkerInfo, problem: str) -> RosterEntry:
        """A worker that answered. One that does not belong to the cluster is like one that is out of reach."""
        if stranger := self.stranger(facts):
            return RosterEntry(facts, stranger, reachable=False)
        return RosterEntry(facts, problem or self.objection(facts))

    def stranger(self, facts: WorkerInfo) -> str:
        """Why a worker, whose certificate is fine, does not belong to the cluster; empty where it does."""
        members = self.trust.members
        if members is None or any(m.role == WORKER and m.id == facts.id for m in members.current()):
            return ""
        return f"{facts.name} was removed from the cluster {self._cluster}, or never admitted to it"

    def _revoked_serials(self) -> frozenset[int]:
        return self.trust.members.revoked() if self.trust.members else frozenset()

    def objection(self, facts: WorkerInfo) -> str:
        """Why a worker that answered cannot be used; empty where it can."""
        if facts.cluster != self._cluster:
            return f"{facts.name} belongs to the cluster {facts.cluster}, not to {self._cluster}"
        if facts.version != __version__:
            return _other_version(facts.name, "macpipe", facts.version, __version__)
        if _mlx_lm_of(facts) != MLX_LM:
            return _other_version(facts.name, "mlx-lm", _mlx_lm_of(facts), MLX_LM)
        if facts.holder and facts.holder != self._coordinator:
            return f"{facts.name} serves {facts.model} for another coordinator"
        if self.has_other_owner(facts):
            return (
                f"{facts.name} serves {facts.model} for another coordinator that has the id of this one, "
                f"{self._coordinator}: {COPIED}"
            )
        return ""

    def has_other_owner(self, facts: WorkerInfo) -> bool:
        """Whether another living coordinator of this one's id holds the worker, or did until a moment ago."""
        return facts.holder == self._coordinator and facts.holder_instance not in ("", self.instance)

    def owns(self, facts: WorkerInfo) -> bool:
        """Whether the worker holds a slice that this coordinator, or one before it of the same id, has given it."""
        return bool(facts.epoch) and facts.owner == self._coordinator

    def control(self, address: str) -> WorkerClient:
        """The control plane of the worker at an address."""
        if address not in self._controls:
            self._controls[address] = WorkerClient(
                self.trust, address, self._coordinator, self.instance, self._revoked_serials
            )
        return self._controls[address]

    async def gather(self, wanted: int | None, wait_s: float, report: LoadReporter) -> tuple[WorkerInfo, ...]:
        """Wait until ``wanted`` usable workers are there, or more; with None, until one is and no more come for a
        moment. All that are there are returned: who of them is best, the plan says.

        Raises ``NoWorkers`` or ``VersionMismatch`` after ``wait_s``, ``DuplicateName`` or ``DuplicateId`` at once, and
        ``DuplicateId`` after ``RESTART_S`` where another living coordinator has this one's id. Until then that may be
        this one's own life before, whose workers are to be adopted.
        """
        told: tuple[str, ...] | None = None
        began = time.monotonic()
        with anyio.move_on_after(wait_s):
            while True:
                usable = _usable(await self.refresh(), wanted)
                if told != (told := tuple(f.name for f in usable)):
                    report.waiting(usable, wanted)
                if taken := next((m for m in self.members if self.has_other_owner(m.facts)), None):
                    if time.monotonic() - began > RESTART_S + SETTLE_S:
                        raise DuplicateId(taken.problem)
                elif (wanted and len(usable) >= wanted) or (not wanted and usable and await self._wait_settled()):
                    return usable
                await self._source.changed(SETTLE_S)
        raise self._nobody(wanted, wait_s)

    async def present(self, wanted: int | None) -> tuple[WorkerInfo, ...]:
        """The usable workers that are there now. Raises as ``gather`` does, without its wait."""
        usable = _usable(await self.refresh(), wanted)
        if len(usable) < (wanted or 1):
            raise self._nobody(wanted, 0.0)
        return usable

    async def _wait_settled(self) -> bool:
        return not await self._source.changed(SETTLE_S)

    def _nobody(self, wanted: int | None, wait_s: float) -> MacpipeError:
        usable = [m.facts.name for m in self.members if not m.problem]
        others = [m.problem for m in self.members if m.problem]
        others += [f"{m.facts.name} is drained" for m in self.members if m.facts.draining]
        if any(m.problem and _is_other_version(m.facts) for m in self.members):
            return VersionMismatch("; ".join(others))
        found = f"found {', '.join(usable)}" if usable else "found no worker"
        return NoWorkers(
            f"waited {wait_s:.0f} s for {wanted or 1} worker{'s' * ((wanted or 1) != 1)} of cluster {self._cluster}, "
            f"{found}{''.join(f'; {o}' for o in others)}. Check that `macpipe worker --cluster {self._cluster}` runs "
            "on each Mac with --host set to its network address, that the Macs share a network that lets multicast "
            "through, or name the workers with --peer HOST:PORT"
        )

    async def forget_absent(self) -> None:
        """Close the channels to addresses that are neither announced nor hold a stage any more."""
        async with self._refreshing:
            await self._forget(self._controls.keys() - self.addresses())

    async def _forget(self, addresses: AbstractSet[str]) -> None:
        for address in tuple(addresses):
            await self._controls.pop(address).close()

    async def close(self) -> None:
        await self._forget(self._controls.keys())


def _usable(members: Sequence[RosterEntry], wanted: int | None) -> tuple[WorkerInfo, ...]:
    """Members without a problem, namesakes left out where ``wanted`` can be had without them.

    Raises ``DuplicateName`` or ``DuplicateId`` where it cannot.
    """
    copied = next((m for m in members if m.duplicate), None)
    fine = tuple(m.facts for m in members if not m.problem and not m.facts.draining)
    counts = Counter(f.name for f in fine)
    single = tuple(f for f in fine if counts[f.name] == 1)
    if (len(single) == len(fine) and not copied) or (wanted and len(single) >= wanted):
        return single
    if copied:
        raise DuplicateId(copied.problem)
    name = next(name for name, count in counts.items() if count > 1)
    where = " and ".join(f.control_address for f in fine if f.name == name)
    raise DuplicateName(f"two workers are named {name}, at {where}; start one of them with another --name")


def _with_duplicates(members: Sequence[RosterEntry]) -> tuple[RosterEntry, ...]:
    """The members, those with a problem that share an id with another process that answers."""
    by_id: dict[str, list[RosterEntry]] = {}
    for member in members:
        if member.reachable and member.facts.id:
            by_id.setdefault(member.facts.id, []).append(member)
    shared = {worker_id: found for worker_id, found in by_id.items() if len(found) > 1}
    return tuple(
        RosterEntry(m.facts, shared_id([o.facts for o in shared[m.facts.id]]), duplicate=True)
        if m.reachable and m.facts.id in shared
        else m
        for m in members
    )


def shared_id(workers: Sequence[WorkerInfo]) -> str:
    """The problem of workers that have one id."""
    where = " and ".join(f"{f.name} at {f.control_address}" for f in workers)
    return f"two workers have the id {workers[0].id}, {where}: {COPIED}"


def _mlx_lm_of(facts: WorkerInfo) -> str:
    return facts.mlx_version.rpartition(" ")[2]


def _is_other_version(facts: WorkerInfo) -> bool:
    """Whether a worker answered that runs another version; one that has not answered names none."""
    return bool(facts.version) and (facts.version != __version__ or _mlx_lm_of(facts) != MLX_LM)


def _other_version(name: str, what: str, theirs: str, ours: str) -> str:
    return f"{name} runs {what} {theirs}, this coordinator {ours}; install the same version on both"


def _stranger(address: str) -> WorkerInfo:
    """A worker of which only the address is known."""
    return WorkerInfo(
        id="",
        name=address,
        version="",
        cluster="",
        control_address=address,
        data_address="",
        chip="",
        backend="",
        mlx_version="",
        memory_total=0,
        memory_limit=0,
    )
