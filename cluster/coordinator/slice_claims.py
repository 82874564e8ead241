"""Know which slices the deployments of a coordinator hold on its workers, and how much memory each may use there.

A load names the slices of all others, which the worker keeps. So a claim begins before its slice is loaded, and ends
once nobody wants the slice any more, whether the worker has heard of that or not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SliceClaim:
    """A slice of one holder on one worker: its epoch, and the bytes that it may use with its caches."""

    epoch: int
    nbytes: int


class SliceClaims:
    """The claims of all holders, by the workers' control addresses. A holder has at most one slice on a worker."""

    def __init__(self) -> None:
        self._claims: dict[str, dict[str, SliceClaim]] = {}

    def claim(self, holder: str, address: str, claim: SliceClaim) -> None:
        """Note what a holder loads on a worker, in place of its previous slice there."""
        self._claims = {known: found for known, found in self._claims.items() if found}
        self._claims.setdefault(address, {})[holder] = claim

    def release(self, holder: str, address: str, epoch: int) -> None:
        """Note that a holder no longer wants its slice on a worker, if it is of this epoch or an older one."""
        found = self._claims.get(address, {})
        if (claim := found.get(holder)) and claim.epoch <= epoch:
            del found[holder]

    def release_all_but(self, holder: str, addresses: Collection[str]) -> None:
        """Note that a holder wants slices on these workers only."""
        for address, found in self._claims.items():
            if address not in addresses:
                found.pop(holder, None)

    def others(self, holder: str, address: str) -> tuple[SliceClaim, ...]:
        """Return the claims of all other holders on a worker."""
        return tuple(claim for name, claim in self._claims.get(address, {}).items() if name != holder)
