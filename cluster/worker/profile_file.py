"""A worker's stored measurements: its profile, corrections learned from frames, its links, and its groups' sums.

A file of another version, chip or backend, or one that cannot be read, is ignored: the worker measures again. The
module knows figures and a file; it measures nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cluster.core.all_reduce import FEW_BYTES, AllReduce, SumSource
from cluster.core.group_limits import KEPT_SUMS, SUMS_KEPT_S
from cluster.core.limits import (
    CORRECTION_BOUND,
    KEPT_CORRECTIONS,
    KIB,
    LEARN_SHARE,
    LEARN_STEP,
)
from cluster.core.link_limits import KEPT_LINKS, LINK_KEPT_S
from cluster.core.plan import Link, Profile, valid_verify_costs
from cluster.platform.json_file import read_json, write_json

log = logging.getLogger(__name__)

MAX_BYTES: Final = 256 * KIB
"""A profile with ``KEPT_LINKS`` links and ``KEPT_CORRECTIONS`` corrections takes much less."""
_UNREADABLE: Final = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What reading raises if the file is missing, damaged, or of another format."""


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """``key`` describes the circumstances of the measurement, such as versions and the chip."""

    key: str
    profile: Profile = field(default_factory=Profile)
    links: tuple[tuple[str, Link, float], ...] = ()
    """The other worker's id and host, the link from there, and when it was measured (seconds since the epoch)."""
    sums: tuple[tuple[str, AllReduce, float], ...] = ()
    """What names a group that this worker is in, how fast it adds up, and when that was measured."""
    disturbed: str = ""
    """What disturbed the measurement, in words; such a profile is measured again at the next start."""


class ProfileFile:
    """One worker's file. ``kept`` is its present content."""

    def __init__(self, path: Path, key: str, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self.kept = _read(path, key)

    def put(self, profile: Profile, disturbed: str = "") -> None:
        """Store a new measurement and drop corrections of the old one."""
        self._keep(replace(self.kept, profile=profile, disturbed=disturbed))

    def store_correction(self, fingerprint: str, ratio: float) -> None:
        """Move a model's correction towards ``ratio``, which is the measured time of new frames over the predicted one.

        It moves by ``LEARN_SHARE`` of the way and begins at the factor that predictions use now. If the measurement was
        disturbed and frames are faster, it moves all the way: such a profile is too slow, and says nothing against
        them. The oldest correction of many is dropped.
        """
        profile = self.kept.profile
        if not math.isfinite(ratio) or not profile.known:
            return
        bounded = min(max(ratio, 1 / CORRECTION_BOUND), CORRECTION_BOUND)
        before = profile.correction(fingerprint)
        if fingerprint in dict(profile.corrections) and abs(bounded - before) <= LEARN_STEP * before:
            return
        share = 1.0 if self.kept.disturbed and bounded < before else LEARN_SHARE
        moved = before ** (1 - share) * bounded**share
        others = [pair for pair in profile.corrections if pair[0] != fingerprint]
        learned = (*others, (fingerprint, round(moved, 4)))[-KEPT_CORRECTIONS:]
        self._keep(replace(self.kept, profile=replace(self.kept.profile, corrections=learned)))

    def link(self, worker: str, address: str, kept_s: float = LINK_KEPT_S) -> Link | None:
        """Return the link from a worker, if it was measured within ``kept_s`` seconds and to the same host."""
        end = _link_end(worker, address)
        fresh = (link for known, link, at in self.kept.links if known == end and 0 <= self._now() - at < kept_s)
        return next(fresh, None)

    def put_link(self, worker: str, address: str, link: Link) -> None:
        """Store a link that was just measured."""
        end = _link_end(worker, address)
        others = [entry for entry in self.kept.links if entry[0] != end]
        kept = replace(link, address="")  # its port changes at each start
        self._keep(replace(self.kept, links=(*others, (end, kept, self._now()))[-KEPT_LINKS:]))

    def forget_link(self, worker: str, address: str) -> None:
        """Drop a link that failed, so that it is measured again before it is used."""
        end = _link_end(worker, address)
        self._keep(replace(self.kept, links=tuple(entry for entry in self.kept.links if entry[0] != end)))

    def sums(self, group: str) -> AllReduce | None:
        """Return how fast a group adds up, if it was measured recently."""
        fresh = (found for name, found, at in self.kept.sums if name == group and 0 <= self._now() - at < SUMS_KEPT_S)
        return next(fresh, None)

    def put_sums(self, group: str, found: AllReduce) -> AllReduce:
        """Store how fast a group adds up, which was just measured. Return what is kept.

        A disturbed measurement replaces no faster one: what disturbs only ever makes sums look slower.
        """
        before = self.sums(group)
        if before and found.is_disturbed and before.seconds_of(FEW_BYTES) <= found.seconds_of(FEW_BYTES):
            return before
        others = [entry for entry in self.kept.sums if entry[0] != group]
        self._keep(replace(self.kept, sums=(*others, (group, found, self._now()))[-KEPT_SUMS:]))
        return found

    def _keep(self, kept: StoredProfile) -> None:
        self.kept = kept
        try:
            write_json(self._path, asdict(kept))
        except OSError as e:  # a full disk costs the next start two seconds, nothing else
            log.warning("profile: not stored reason=%s path=%s", e.strerror, self._path)


def _link_end(worker: str, address: str) -> str:
    """Return the worker's id and host. The port changes at each start, the host does not."""
    return f"{worker} {address.rpartition(':')[0]}"


def _read(path: Path, key: str) -> StoredProfile:
    try:
        kept = _read_profile(read_json(path, MAX_BYTES))
    except _UNREADABLE:
        return StoredProfile(key)
    return kept if kept.key == key else StoredProfile(key)


def _link(round_trip_s: float, bandwidth: float, interface: str = "", **_: object) -> Link:
    if not (math.isfinite(round_trip_s) and round_trip_s >= 0 and math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError("invalid link")
    return Link(float(round_trip_s), float(bandwidth), str(interface))


def _sums(facts: Mapping[str, Any]) -> AllReduce:
    disturbed = SumSource(facts["source"]) is SumSource.DISTURBED
    found = AllReduce.measured(float(facts["seconds"]), float(facts["bandwidth"]), disturbed=disturbed)
    if not found.is_possible:
        raise ValueError("invalid speed of sums")
    return found


def _read_profile(facts: Any) -> StoredProfile:
    profile = facts["profile"]
    learned = tuple((str(model), float(ratio)) for model, ratio in profile.pop("corrections")[-KEPT_CORRECTIONS:])
    costs = tuple((tokens, float(cost)) for tokens, cost in profile.pop("verify_costs", ()))
    figures = {name: float(value) for name, value in profile.items()}
    ratios = dict(learned).values()
    if not all(math.isfinite(v) and v >= 0 for v in (*figures.values(), *ratios)) or not all(r > 0 for r in ratios):
        raise ValueError("invalid figure")
    if not valid_verify_costs(costs):
        raise ValueError("invalid cost of a step")
    links = tuple((str(end), _link(**link), float(at)) for end, link, at in facts["links"])
    sums = tuple((str(group), _sums(found), float(at)) for group, found, at in facts.get("sums", ()))
    measured = Profile(**figures, corrections=learned, verify_costs=costs)
    return StoredProfile(str(facts["key"]), measured, links, sums, str(facts.get("disturbed", "")))
