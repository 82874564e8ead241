"""Keep the roster: the workers that answered, not just the addresses that were announced.

An announcement is only a hint. A worker counts once it has described itself over its control port, and belongs to this
cluster and runs this version.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import anyio

from cluster import __version__
from cluster.coordinator.lost_workers import KnownWorker, LostWorkers
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.term_holder import TermHolder
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import DuplicateId, DuplicateName, MacpipeError, NoWorkers, VersionMismatch
from cluster.core.limits import DESCRIBE_TIMEOUT_S, HEARTBEAT_S, RESTART_S, SETTLE_S
from cluster.core.text import count_in_words
from cluster.core.worker import WorkerInfo
from cluster.discovery.sighting import Source
from cluster.membership.terms import Process
from cluster.security.trust import WORKER, Trust
from cluster.transport.rich_errors import OUTSIDE

COPIED: Final = (
    "the state folder of one was copied from the other. Stop one of them, or start it with --home or MACPIPE_HOME set "
    "to a folder of its own"
)
MLX_LM: Final = version("mlx-lm")
"""Read once, since the lookup takes a millisecond and every heartbeat compares it."""


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """A worker that was seen: its description, and the problem that makes it unusable ("" for none)."""

    info: WorkerInfo
    problem: str = ""
    reachable: bool = True
    duplicate: bool = False
    """Whether another living worker has its id; ``problem`` says so."""
    outside: str = ""
    """In which way the server at its address is no member of this cluster; "" if it may be one."""


class Roster:
    """The workers of one cluster, found through ``source``. ``trust`` holds the admitted members.

    ``coordinator`` is the id of the service, which a standby has from its leader.
    """

    def __init__(self, source: Source, cluster: str, coordinator: str, trust: Trust) -> None:
        self._source, self._cluster, self._coordinator = source, cluster, coordinator
        self.instance = secrets.token_hex(8)
        self.inherited_epoch = 0
        """Slices up to this epoch are from the leader before this one, although the workers are led by this one now."""
        self.silent: set[str] = set()
        """Addresses at which no worker answered in this process's election. Nobody waits for one before it answers."""
        self._lost = LostWorkers()
        self.terms = TermHolder(Process(coordinator, self.instance))
        """The term by which this process leads the workers that it loads."""
        self.hears_coordinator: Callable[[str], bool] = lambda name: False
        """Whether the coordinator of this name answers, which may hold the cluster's authority."""
        self.on_taken: Callable[[Sequence[WorkerClient]], Awaitable[None]] | None = None
        """Called with the workers of each load once they have granted the term, before anything is loaded."""
        self.trust = trust
        self._refreshing = anyio.Lock()
        self._controls: dict[str, WorkerClient] = {}
        self._pinned: dict[str, dict[str, WorkerInfo]] = {}
        """By the name of the holder, then by control address."""
        self.members: tuple[RosterEntry, ...] = ()

    def pin(self, holder: str, workers: Sequence[WorkerInfo]) -> None:
        """Keep asking the workers that hold something for ``holder``, even if no longer announced.

        Replaces the holder's previous set; an empty one forgets the holder.
        """
        if workers:
            self._pinned[holder] = {w.control_address: w for w in workers}
        else:
            self._pinned.pop(holder, None)

    async def take_term(self, workers: Sequence[WorkerClient]) -> None:
        """Lead all these workers by one term. Raises as ``TermHolder.take``, and the error of ``on_taken``."""
        await self.terms.take(workers)
        if self.on_taken:
            await self.on_taken(workers)

    def ring_workers(self) -> list[WorkerClient]:
        """Return the clients of all workers that hold something."""
        return [self.control(address) for address in set().union(*self._pinned.values())]

    def spare_workers(self) -> list[WorkerClient]:
        """Return the clients of the workers that are led and hold nothing."""
        holding = set().union(*self._pinned.values())
        return [self.control(address) for address in self.terms.led if address not in holding]

    def holders(self, address: str) -> set[str]:
        """Return the names of those for whom the worker at an address is pinned."""
        return {holder for holder, workers in self._pinned.items() if address in workers}

    async def refresh(self) -> tuple[RosterEntry, ...]:
        """Ask all announced workers at once to describe themselves. Return the members, sorted by name."""
        async with self._refreshing:  # a concurrent refresh could close channels that this one uses
            return await self._refresh()

    async def _refresh(self) -> tuple[RosterEntry, ...]:
        addresses = self.addresses()
        answers: dict[str, RosterEntry] = {}
        async with anyio.create_task_group() as tasks:
            for address in addresses:
                tasks.start_soon(self._ask, address, answers)
        await self._forget(self._controls.keys() - self.addresses())  # a load may have begun on another one meanwhile
        # reachable members come last, so they replace unreachable ones of the same process
        by_reachable = sorted(answers.values(), key=lambda m: m.reachable)
        unique = {(m.info.id or m.info.control_address, m.info.instance): m for m in by_reachable}
        ordered = sorted(unique.values(), key=lambda m: (m.info.name, m.info.id, m.info.control_address))
        self.members = _with_duplicates(ordered)
        return self.members

    def addresses(self) -> set[str]:
        """Return the control addresses of all announced workers and of those that hold a stage."""
        return set().union(*self._pinned.values(), (s.address for s in self._source.current()))

    async def _ask(self, address: str, answers: dict[str, RosterEntry]) -> None:
        try:
            timeout_s = HEARTBEAT_S if address in self.silent else DESCRIBE_TIMEOUT_S
            info, problem = await self.control(address).describe(timeout_s)
        except MacpipeError as e:
            pinned = (workers[address] for workers in self._pinned.values() if address in workers)
            missed = (entry.info for entry in self.lost() if entry.info.control_address == address)
            known = next(pinned, None) or next(missed, None) or _unknown_worker(address)
            answers[address] = RosterEntry(known, e.sentence, reachable=False, outside=e.details.get(OUTSIDE, ""))
        else:
            self.silent.discard(address)
            answers[address] = self.member(info, problem)

    def miss(self, workers: Iterable[KnownWorker]) -> None:
        """Name those of these workers of the leader before that did not answer in this process's election."""
        self._lost.miss(worker for worker in workers if worker.address in self.silent)

    def lost(self) -> tuple[RosterEntry, ...]:
        """Return the workers of the leader before that have not answered since, without those that were removed."""
        found = (_unknown_worker(one.address, one.name, one.id) for one in self._lost.all())
        return tuple(
            RosterEntry(info, f"worker {info.name} has not answered since this coordinator leads", reachable=False)
            for info in found
            if not self.why_not_member(info)
        )

    @property
    def lost_since(self) -> float:
        """When it was found that the workers of ``lost`` do not answer, in seconds of ``time.monotonic``."""
        return self._lost.since

    def member(self, info: WorkerInfo, problem: str) -> RosterEntry:
        """Return the entry of a worker that answered. A worker outside the cluster counts as unreachable."""
        self._lost.hear(info.id)
        if why := self.why_not_member(info):
            return RosterEntry(info, why, reachable=False, outside="removed")
        return RosterEntry(info, problem or self.why_unusable(info))

    def why_not_member(self, info: WorkerInfo) -> str:
        """Return why a worker with a valid certificate is not a member of the cluster; "" if it is."""
        members = self.trust.members
        if members is None or any(m.role == WORKER and m.id == info.id for m in members.current()):
            return ""
        return f"{info.name} was removed from the cluster {self._cluster}, or never admitted to it"

    @property
    def authority_problem(self) -> str:
        """What cannot be done while the authority's Mac does not answer; "" if it does, or is this one."""
        if self.trust.members is None or self.trust.renewal is None:
            return ""
        from cluster.security.authority import find_holder

        holder = find_holder(self.trust.renewal.folder, self.trust.members)
        return "" if holder.here or self.hears_coordinator(holder.name) else holder.problem(self._cluster)

    def _revoked_serials(self) -> frozenset[int]:
        return self.trust.members.revoked() if self.trust.members else frozenset()

    def why_unusable(self, info: WorkerInfo) -> str:
        """Return why a worker that answered cannot be used; "" if it can."""
        if why := self._why_other(info):
            return why
        if info.live_owner and info.live_owner != self._coordinator:
            return f"{_serving(info)} for another coordinator"
        if self.is_held_by_other_process(info):
            if self.was_elected and info.term < self.terms.number:
                return f"{_serving(info, 'still ')} for the leader before this one (term {info.term})"
            return (
                f"{_serving(info)} for another coordinator that has the id of this one, {self._coordinator}: {COPIED}"
            )
        return ""

    def why_foreign(self, info: WorkerInfo) -> str:
        """Return why a worker that answered can be led by no coordinator of this cluster; "" if it can."""
        return self.why_not_member(info) or self._why_other(info)

    def _why_other(self, info: WorkerInfo) -> str:
        if info.cluster != self._cluster:
            return _other_cluster([info.name], info.cluster, self._cluster)
        differs = _version_difference(info)
        return _other_version([info.name], *differs) if differs else ""

    def is_held_by_other_process(self, info: WorkerInfo) -> bool:
        """Return whether another process with this coordinator's id owns the worker, or did until a moment ago."""
        return info.live_owner == self._coordinator and info.live_owner_process not in ("", self.instance)

    @property
    def was_elected(self) -> bool:
        """Whether this process leads in place of another one."""
        return self.inherited_epoch > 0

    @property
    def has_all_heard(self) -> bool:
        """Whether this process was elected, and all workers that answered it then are members now."""
        reachable = {member.info.control_address for member in self.members if member.reachable}
        return self.was_elected and self.addresses() - self.silent <= reachable

    def owns(self, info: WorkerInfo) -> bool:
        """Return whether the worker holds a slice from this coordinator or a predecessor with the same id."""
        return bool(info.epoch) and info.owner == self._coordinator

    def holds_from_before(self, info: WorkerInfo, epoch: int | None = None) -> bool:
        """Return whether the worker's slice of this epoch is from a predecessor with the same id.

        Without an epoch, its first slice.
        """
        before = info.live_owner_process != self.instance
        return self.owns(info) and (before or (info.epoch if epoch is None else epoch) <= self.inherited_epoch)

    def control(self, address: str) -> WorkerClient:
        """Return the client of the worker at an address; create it on first use."""
        if address not in self._controls:
            self._controls[address] = WorkerClient(
                self.trust,
                address,
                self._coordinator,
                self.instance,
                self._revoked_serials,
                lambda: self.terms.number,
            )
        return self._controls[address]

    async def gather(
        self,
        wanted: int | None,
        wait_s: float,
        report: LoadReporter,
        counts: Callable[[WorkerInfo], bool] = lambda worker: True,
        purpose: str = "",
    ) -> tuple[WorkerInfo, ...]:
        """Wait for at least ``wanted`` usable workers; with None, for one, until no more come for ``SETTLE_S``.

        Do not wait longer where each worker that is found would first have to be started in another way.
        Workers that ``counts`` rejects are not counted towards ``wanted``. Return all usable workers: the plan chooses
        the best of them, and says what is missing if ``wanted`` are there but too few count. ``purpose`` says in an
        error what that many workers are for, "" if it is the model alone. Raises ``NoWorkers`` or
        ``VersionMismatch`` after ``wait_s``, and ``DuplicateName`` or ``DuplicateId`` at once. Raises ``DuplicateId``
        after ``RESTART_S`` if another coordinator process with this one's id keeps a worker: until then, it may be the
        previous process of this coordinator, whose workers are to be adopted.
        """
        reported: tuple[str, ...] | None = None
        conflict_began: float | None = None
        with anyio.move_on_after(wait_s):
            while True:
                usable = _usable(await self.refresh(), wanted)
                drained = tuple(m.info for m in self.members if m.info.draining and not m.problem)
                names = tuple(f"{f.name} {f.draining}" for f in (*usable, *drained))
                if names != reported:
                    reported = names
                    report.waiting((*usable, *drained), wanted)
                conflicting = next((m for m in self.members if self.is_held_by_other_process(m.info)), None)
                conflict_began = (conflict_began or time.monotonic()) if conflicting else None
                if conflicting and conflict_began:
                    if time.monotonic() - conflict_began > RESTART_S + SETTLE_S:
                        raise DuplicateId(conflicting.problem)
                elif (wanted and sum(map(counts, usable)) >= wanted) or (
                    not wanted and usable and await self._wait_settled()
                ):
                    return usable
                elif not usable and self._all_stay_unusable() and await self._wait_settled():
                    break
                await self._source.changed(SETTLE_S)
        usable = _usable(self.members, wanted)
        if len(usable) >= (wanted or 1):
            return usable
        raise self._too_few_workers(wanted, wait_s, purpose)

    async def present(self, wanted: int | None) -> tuple[WorkerInfo, ...]:
        """Return the usable workers present now. Raises the errors of ``gather``, without waiting."""
        usable = _usable(await self.refresh(), wanted)
        if len(usable) < (wanted or 1):
            raise self._too_few_workers(wanted, 0.0)
        return usable

    async def _wait_settled(self) -> bool:
        return not await self._source.changed(SETTLE_S)

    def _too_few_workers(self, wanted: int | None, wait_s: float, purpose: str = "") -> MacpipeError:
        usable = [m.info.name for m in self.members if not m.problem and not m.info.draining]
        others = self._causes()
        if any(m.problem and _is_other_version(m.info) for m in self.members):
            return VersionMismatch("; ".join(others))
        if self._all_stay_unusable():
            return NoWorkers(f"no worker can be used: {'; '.join(others)}")
        found = f"found {', '.join(usable)}" if usable else "found no worker"
        looked = f"waited {wait_s:.0f} s for" if wait_s >= 1 else "wanted"
        outcome = (
            f"{looked} {count_in_words(wanted or 1, 'worker')} of cluster {self._cluster}"
            f"{f' ({purpose})' if purpose else ''}, {found}{''.join(f'; {o}' for o in others)}"
        )
        if len(self.members) >= (wanted or 1) and all(not m.problem or self._stays_unusable(m) for m in self.members):
            return NoWorkers(outcome)  # enough are found, and why the others cannot be used is known
        return NoWorkers(
            f"{outcome}. Check that `macpipe worker --cluster {self._cluster}` runs "
            "on each Mac with --host set to its network address, that the Macs share a network that lets multicast "
            "through, or name the workers with --peer HOST:PORT"
        )

    def _all_stay_unusable(self) -> bool:
        """Return whether workers were found, and none can be used before somebody does something about it."""
        return bool(self.members) and all(self._stays_unusable(m) for m in self.members)

    def _stays_unusable(self, member: RosterEntry) -> bool:
        """Return whether a worker is drained, of another version or of another cluster, so that waiting is no use."""
        info = member.info
        differs = member.reachable and (_is_other_version(info) or info.cluster != self._cluster)
        return bool(member.outside or (member.problem and differs) or (info.draining and not member.problem))

    def _causes(self) -> list[str]:
        """Return why workers cannot be used: those that are drained first, and those of one cause in one sentence."""
        drained, causes = [], []
        old: dict[tuple[str, str, str], list[str]] = {}
        foreign: dict[str, list[str]] = {}
        outside: dict[str, list[RosterEntry]] = {}
        for m in self.members:
            if m.outside:
                outside.setdefault(m.outside, []).append(m)
            elif m.problem and m.reachable and m.info.cluster != self._cluster:
                foreign.setdefault(m.info.cluster, []).append(m.info.name)
            elif m.problem and (differs := _version_difference(m.info)) and m.info.cluster == self._cluster:
                old.setdefault(differs, []).append(m.info.name)
            elif m.problem:
                causes.append(m.problem)
            elif m.info.draining:
                drained.append(f"{m.info.name} is drained; `macpipe drain {m.info.name} --undo` takes it back")
        return [
            *drained,
            *(_other_version(names, *differs) for differs, names in old.items()),
            *causes,
            *(_other_cluster(names, cluster, self._cluster) for cluster, names in foreign.items()),
            *map(_outside, outside.values()),
        ]

    async def forget_absent(self) -> None:
        """Close the channels to addresses that are no longer announced and hold no stage."""
        async with self._refreshing:
            await self._forget(self._controls.keys() - self.addresses())

    async def _forget(self, addresses: AbstractSet[str]) -> None:
        gone = [self._controls.pop(address) for address in tuple(addresses)]
        for control in gone:
            await control.close()

    async def close(self) -> None:
        await self._forget(self._controls.keys())


def _usable(members: Sequence[RosterEntry], wanted: int | None) -> tuple[WorkerInfo, ...]:
    """Return the members without a problem. Leave out workers that share a name if ``wanted`` can be met without them.

    Raises ``DuplicateName`` or ``DuplicateId`` if it cannot.
    """
    copied = next((m for m in members if m.duplicate), None)
    fine = tuple(m.info for m in members if not m.problem and not m.info.draining)
    counts = Counter(f.name for f in fine)
    single = tuple(f for f in fine if counts[f.name] == 1)
    if (len(single) == len(fine) and not copied) or (wanted and len(single) >= wanted):
        return single
    if copied:
        raise DuplicateId(copied.problem)
    name = next(name for name, count in counts.items() if count > 1)
    where = " and ".join(f.control_address for f in fine if f.name == name)
    raise DuplicateName(f"two workers are named {name} (at {where}); restart one with another --name")


def _with_duplicates(members: Sequence[RosterEntry]) -> tuple[RosterEntry, ...]:
    """Return the members, with a problem set on those that share their id with another process that answers."""
    by_id: dict[str, list[RosterEntry]] = {}
    for member in members:
        if member.reachable and member.info.id:
            by_id.setdefault(member.info.id, []).append(member)
    shared = {worker_id: found for worker_id, found in by_id.items() if len(found) > 1}
    return tuple(
        RosterEntry(m.info, shared_id([o.info for o in shared[m.info.id]]), duplicate=True)
        if m.reachable and m.info.id in shared
        else m
        for m in members
    )


def shared_id(workers: Sequence[WorkerInfo]) -> str:
    """Return the problem of several workers that have the same id."""
    where = " and ".join(f"{f.name} at {f.control_address}" for f in workers)
    return f"two workers have the id {workers[0].id}, {where}: {COPIED}"


def _serving(info: WorkerInfo, still: str = "") -> str:
    """Return the beginning of a sentence about a worker that another coordinator leads, perhaps without a slice."""
    return f"{info.name} {still}serves {info.model}" if info.model else f"{info.name} is {still}kept"


def _mlx_lm_of(info: WorkerInfo) -> str:
    return info.mlx_version.rpartition(" ")[2]


def _is_other_version(info: WorkerInfo) -> bool:
    """Return whether a worker runs another version; False for a worker that never answered."""
    return bool(info.version) and _version_difference(info) is not None


def _version_difference(info: WorkerInfo) -> tuple[str, str, str] | None:
    """Return the package that differs, the worker's version and this coordinator's; None if both are the same."""
    if info.version != __version__:
        return "macpipe", info.version, __version__
    return None if _mlx_lm_of(info) == MLX_LM else ("mlx-lm", _mlx_lm_of(info), MLX_LM)


def _other_version(names: Sequence[str], what: str, theirs: str, ours: str) -> str:
    one = len(names) == 1
    where = "both" if one else "all Macs"
    who = f"{', '.join(names)} run{'s' * one}"
    return f"{who} {what} {theirs}, this coordinator {ours}; install the same version on {where}"


def _other_cluster(names: Sequence[str], theirs: str, ours: str) -> str:
    return f"{', '.join(names)} belong{'s' * (len(names) == 1)} to the cluster {theirs}, not to {ours}"


def _outside(members: Sequence[RosterEntry]) -> str:
    """Return the problem of servers that are outside the cluster in the same way."""
    first, *others = members
    same = f"; the same is true at {', '.join(m.info.control_address for m in others)}"
    return f"{first.problem}{same if others else ''}"


def _unknown_worker(address: str, name: str = "", id: str = "") -> WorkerInfo:  # noqa: A002
    """Return the description of a worker of which only the address is known, and at most its name and id."""
    return WorkerInfo(
        id=id,
        name=name or address,
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
