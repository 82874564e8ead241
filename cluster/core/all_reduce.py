"""How fast the ranks of a group add up what each of them has computed, and where that figure comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cluster.core.limits import KIB, MIB

__all__ = ["FEW_BYTES", "MANY_BYTES", "SUMS_PER_LAYER", "AllReduce", "SumSource"]

FEW_BYTES: Final = 16 * KIB
"""What one token of a model of 70 billion parameters adds up."""
MANY_BYTES: Final = MIB
SUMS_PER_LAYER: Final = 2
"""After attention, and after the part behind it: so all models are that mlx-lm shares among ranks."""


class SumSource(StrEnum):
    """Where the speed of sums comes from, as people read it."""

    MEASURED = "measured"
    DISTURBED = "measured beside other programs"
    ESTIMATED = "estimated from the links"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True)
class AllReduce:
    """The seconds of a sum in a chain of sums, and the bytes a second by which a larger one takes longer.

    ``seconds`` include the first ``included`` bytes.
    """

    seconds: float
    bandwidth: float
    source: SumSource = SumSource.ESTIMATED
    included: int = 0

    def seconds_of(self, nbytes: float) -> float:
        return self.seconds + max(nbytes - self.included, 0) / self.bandwidth

    @property
    def is_possible(self) -> bool:
        """Whether the figures could be those of a group."""
        return math.isfinite(self.seconds + self.bandwidth) and self.seconds > 0 and self.bandwidth > 0

    @property
    def is_disturbed(self) -> bool:
        """Whether it was measured while the machine had more to do, which only ever makes sums look slower."""
        return self.source is SumSource.DISTURBED

    @classmethod
    def measured(cls, seconds: float, bandwidth: float, *, disturbed: bool = False) -> AllReduce:
        """Return what was measured by sums of ``FEW_BYTES`` and of ``MANY_BYTES``."""
        return cls(seconds, bandwidth, SumSource.DISTURBED if disturbed else SumSource.MEASURED, FEW_BYTES)

    @classmethod
    def between(cls, few_s: float, many_s: float, *, disturbed: bool = False) -> AllReduce:
        """Return the measured speed, by the seconds of a sum of ``FEW_BYTES`` and of one of ``MANY_BYTES``.

        A sum of fewer bytes counts as one of ``FEW_BYTES``: over TCP, what is below costs nothing, and a line through
        both points would end below zero.
        """
        return cls.measured(few_s, (MANY_BYTES - FEW_BYTES) / max(many_s - few_s, 1e-9), disturbed=disturbed)
