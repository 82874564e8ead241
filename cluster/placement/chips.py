"""The assumed speed of Macs that are not present, by chip name, for ``--assume``. Never used for a measured Mac.

Bandwidths are from Apple's technical specifications pages (support.apple.com/specs). GPU speeds in FP32 of the M1 and
M2 families are from Apple's announcements (2.6, 5.2, 10.4 and 21; 3.6, 6.8, 13.6 and 27.2 TFLOPS). Apple has published
no such figure since. Those of the M3 to M5 families are the published number of GPU cores times 256 operations per
cycle at measured clocks (1.4 to 1.6 GHz); what neural accelerators of the M5 family add to prompts is not counted.
A chip that Apple has not specified, such as an M4 Ultra or M5 Ultra, is not listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cluster.core.all_reduce import AllReduce, SumSource
from cluster.core.errors import InvalidOption
from cluster.core.limits import ASSUMED_ROUND_TRIP_S, GIB
from cluster.core.plan import Link, Profile
from cluster.placement.candidates import ASSUMED_LINK, Candidate, Candidates
from cluster.placement.memory_split import WorkerMemory

__all__ = ["CHIPS", "LINKS", "Chip", "assumed_workers", "assumption"]

DECODE_EFFICIENCY: Final = 0.8
"""The share of the published bandwidth that a 4-bit decode commonly reaches on one die."""
DECODE_EFFICIENCY_ULTRA: Final = 0.65
"""The same share on two dies."""
PREFILL_EFFICIENCY: Final = 0.6
"""The share of the published operations that a long prompt commonly reaches."""
LAYER_S: Final = 60e-6
STEP_S: Final = 300e-6
ROW_COST: Final = 0.2
"""8 rows cost 2.4 times as much as one; 4-bit kernels were measured at 1.7 to 6 times."""
LARGE_MEMORY_GB: Final = 36
"""Up to this size Metal recommends using two thirds of the memory, above it three quarters."""
MIN_MEMORY_GB: Final = 8
MAX_MEMORY_GB: Final = 1024
"""Range of memory sizes that a Mac may be assumed to have, in GB."""
MAX_COUNT: Final = 64
"""Maximum number of Macs of one kind."""


@dataclass(frozen=True, slots=True)
class Chip:
    """The published figures of a chip: ``bandwidth`` in GB/s, and ``tflops`` of the largest GPU.

    ``smaller``: the memory sizes in GB that are sold with a smaller GPU, and the two figures of that GPU.
    """

    bandwidth: float
    tflops: float
    smaller: tuple[tuple[int, ...], float, float] | None = None


CHIPS: Final = {
    "m1": Chip(68, 2.6),
    "m1-pro": Chip(200, 5.2),
    "m1-max": Chip(400, 10.4),
    "m1-ultra": Chip(800, 21.0),
    "m2": Chip(100, 3.6),
    "m2-pro": Chip(200, 6.8),
    "m2-max": Chip(400, 13.6),
    "m2-ultra": Chip(800, 27.2),
    "m3": Chip(100, 3.5),
    "m3-pro": Chip(150, 6.4),
    "m3-max": Chip(400, 14.2, ((36, 96), 300, 10.6)),
    "m3-ultra": Chip(819, 28.4),
    "m4": Chip(120, 4.0),
    "m4-pro": Chip(273, 8.1),
    "m4-max": Chip(546, 16.2, ((36,), 410, 12.9)),
    "m5": Chip(153, 4.1),
    "m5-pro": Chip(307, 8.3),
    "m5-max": Chip(614, 16.6, ((36,), 460, 13.3)),
}
LINKS: Final = {
    "1gbe": ASSUMED_LINK,
    "2.5gbe": Link(ASSUMED_ROUND_TRIP_S, 290e6),
    "10gbe": Link(ASSUMED_ROUND_TRIP_S, 1.15e9),
    "tb4": Link(ASSUMED_ROUND_TRIP_S, 2e9),
    "tb5": Link(ASSUMED_ROUND_TRIP_S, 5e9),
    "tb5-rdma": Link(ASSUMED_ROUND_TRIP_S, 5e9, "RDMA"),
    "wifi": Link(5e-3, 40e6),
}
RDMA_SUM: Final = AllReduce(50e-6, 5e9, SumSource.ASSUMED)
"""Published measurements of MLX's jaccl over Thunderbolt 5 are 25 to 50 us for a few KB between two Macs."""
_MAC: Final = re.compile(r"((?P<times>\d+)x\s*)?(?P<chip>m\d+(-[a-z]+)?)-(?P<gb>\d+)(gb)?(x(?P<count>\d+))?")


def assumed_workers(written: str, *, relay: bool = False) -> Candidates:
    """Parse the value of ``--assume``, such as ``m2-ultra-192,m4-pro-48x2,10gbe``.

    Each Mac is a chip and its GB of memory, with an optional count. At most one link may be given; it is used for all
    hops. ``2x m4-pro-48`` is the same as ``m4-pro-48x2``, and a plus is the same as a comma.

    Raise InvalidOption, with the accepted values, if it is invalid.
    """
    words = [word.strip().lower() for word in re.split("[,+]", written) if word.strip()]
    links = [LINKS[word] for word in words if word in LINKS]
    if len(links) > 1:
        raise InvalidOption("--assume names more than one link; give one, which is used for all hops", field="assume")
    macs = [mac for word in words if word not in LINKS for mac in _macs(word)]
    if not macs:
        raise InvalidOption(f"--assume {written!r} names no Mac; write it like m4-pro-48x2,10gbe", field="assume")
    names = [name for name, _, _ in macs]
    workers = [_candidate(*mac, i, names) for i, mac in enumerate(macs)]
    link = links[0] if links else ASSUMED_LINK
    return Candidates(workers, link=link, relay=relay, sums=RDMA_SUM if link is LINKS["tb5-rdma"] else None)


def _macs(word: str) -> list[tuple[str, Chip, int]]:
    found = _MAC.fullmatch(word)
    count = int((found["times"] or found["count"] or 1) if found else 0)
    twice = found and found["times"] and found["count"]
    if not found or twice or found["chip"] not in CHIPS:
        known = f"chips are {', '.join(CHIPS)}; links are {', '.join(LINKS)}"
        raise InvalidOption(
            f"--assume does not know {word!r}; write it like m4-pro-48x2,10gbe; {known}", field="assume"
        )
    if not 1 <= count <= MAX_COUNT:
        raise InvalidOption(
            f"--assume {word!r}: there are from 1 to {MAX_COUNT} Macs of one kind here, and {count} were given",
            field="assume",
        )
    gb = int(found["gb"])
    if not MIN_MEMORY_GB <= gb <= MAX_MEMORY_GB:
        raise InvalidOption(
            f"--assume {word!r}: a Mac's memory is from {MIN_MEMORY_GB} to {MAX_MEMORY_GB} GB here, and {gb} was given",
            field="assume",
        )
    return [(f"{found['chip']}-{gb}", CHIPS[found["chip"]], gb)] * count


def assumption(candidates: Candidates) -> str:
    """Return a sentence about the assumptions behind a plan for assumed Macs."""
    link = next(name for name, one in LINKS.items() if one == candidates.link)
    return f"assumed: published figures of the chips; links of {link}"


def _candidate(label: str, chip: Chip, gb: int, index: int, names: list[str]) -> Candidate:
    name = label if names.count(label) == 1 else f"{label}#{names[: index + 1].count(label)}"
    bandwidth, tflops = chip.bandwidth, chip.tflops
    if chip.smaller and gb in chip.smaller[0]:
        _, bandwidth, tflops = chip.smaller
    efficiency = DECODE_EFFICIENCY_ULTRA if "ultra" in label else DECODE_EFFICIENCY
    profile = Profile(bandwidth * 1e9 * efficiency, LAYER_S, STEP_S, tflops * 1e12 * PREFILL_EFFICIENCY, ROW_COST)
    nbytes = gb * GIB * (3 if gb > LARGE_MEMORY_GB else 2) // (4 if gb > LARGE_MEMORY_GB else 3)
    return Candidate(WorkerMemory(name, nbytes, adjustable=False), profile)
