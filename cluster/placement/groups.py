"""Groups of workers as candidates for a stage: what one of them holds, and how fast they are together.

The ranks of a group hold a part of every layer, and add up what they have computed twice in each. So a group is planned
like one worker: its memory is that of one rank, and each layer takes the time of two sums more to start. It knows
figures, not where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

from cluster.core.all_reduce import SUMS_PER_LAYER, AllReduce
from cluster.core.errors import NoPlan
from cluster.core.plan import LayerRange, Link, ModelShape, Profile
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.memory_split import WorkerMemory

__all__ = ["combine_groups", "estimate_all_reduce", "group_name", "sum_speed"]


MESH_RANKS = 4
"""Ranks of assumed Macs of which each has a cable to each other one. A MacBook Pro has three Thunderbolt ports."""


def estimate_all_reduce(link: Link, ranks: int) -> AllReduce:
    """Return what sums take over a ring of such links: 2 (ranks - 1) steps, each with a message of 1 / ranks."""
    steps = 2 * (ranks - 1)
    return AllReduce(steps * link.round_trip_s / 2, link.bandwidth * ranks / steps)


def group_name(names: Sequence[str]) -> str:
    """Return how a group is written for people, and as options name it."""
    return "+".join(names)


def combine_groups(
    shape: ModelShape,
    candidates: Candidates,
    groups: Sequence[Sequence[str]],
) -> Candidates:
    """Return the candidates with one in place of each group's members, where the first of them was.

    Raises ``NoPlan`` if a member is not among the candidates.
    """
    by_name = {worker.name: worker for worker in candidates.workers}
    workers = list(candidates.workers)
    for names in groups:
        if missing := [name for name in names if name not in by_name]:
            raise NoPlan(f"worker {missing[0]} of the group {group_name(names)} is not here; start it, or leave it out")
        members = [by_name[name] for name in names]
        at = min(workers.index(member) for member in members)
        workers[at] = _combine(shape, members, sum_speed(candidates, members))
        workers = [worker for worker in workers if worker not in members]
    return replace(candidates, workers=tuple(workers))


def sum_speed(candidates: Candidates, members: Sequence[Candidate]) -> AllReduce:
    """Return what sums of these members take: as is assumed or measured, else as their slowest link makes expect."""
    if candidates.sums:
        return _assume(candidates.sums, len(members))
    known = candidates.measured_sums.get(frozenset(member.name for member in members))
    if known:
        return known
    links = [candidates.between(one, other) for one, other in permutations(members, 2)]
    return estimate_all_reduce(max(links, key=lambda link: link.cost_s), len(members))


def _assume(between_two: AllReduce, ranks: int) -> AllReduce:
    """Return what sums take over assumed cables: to each other rank, or in a ring of more than ``MESH_RANKS``."""
    if ranks <= MESH_RANKS:
        return between_two
    steps = 2 * (ranks - 1)
    return replace(between_two, seconds=steps * between_two.seconds, bandwidth=between_two.bandwidth * ranks / steps)


def _combine(shape: ModelShape, members: Sequence[Candidate], reduce: AllReduce) -> Candidate:
    """Return the candidate that the members are together: as slow as the slowest, as small as the smallest of them."""
    least = min((member.memory for member in members), key=lambda memory: memory.usable)
    memory = WorkerMemory(
        group_name([member.name for member in members]),
        least.nbytes,
        all(member.memory.adjustable for member in members),
        least.taken,
        len(members),
    )
    return Candidate(memory, _profile(shape, members, reduce), members[0].hardware, tuple(members), reduce)


def _profile(shape: ModelShape, members: Sequence[Candidate], reduce: AllReduce) -> Profile:
    """Return the speed of one rank with its share of the sums; ``bandwidth`` 0 if a member's is not known."""
    profiles = [member.profile for member in members]
    if not all(profile.known for profile in profiles):
        return Profile()
    crossing = max(shape.boundary_bytes, default=0)
    slowest = max(profiles, key=lambda profile: profile.correction(shape.model.fingerprint))
    return Profile(
        bandwidth=min(profile.bandwidth for profile in profiles),
        layer_s=max(profile.layer_s for profile in profiles) + SUMS_PER_LAYER * reduce.seconds_of(crossing),
        step_s=max(profile.step_s for profile in profiles),
        flops=_prompt_flops(shape, min(profile.flops for profile in profiles), len(members), crossing, reduce),
        row_cost=max(profile.row_cost for profile in profiles),
        corrections=((shape.model.fingerprint, slowest.correction(shape.model.fingerprint)),),
    )


def _prompt_flops(shape: ModelShape, flops: float, ranks: int, crossing: int, reduce: AllReduce) -> float:
    """Return a rank's rate at which it reads prompts, with the time in which the ranks exchange bytes."""
    own = sum(shape.of_rank(ranks).flops)
    if not flops or not own:
        return flops
    exchanging = SUMS_PER_LAYER * len(LayerRange(0, shape.layers)) * crossing / reduce.bandwidth
    return own / (own / flops + exchanging)
