"""Know which slices the deployments of a coordinator hold on its workers, and how much memory each may use there.

A load names the slices of all others, which the worker keeps. So a claim begins before its slice is loaded, and ends
once nobody wants the slice any more, whether the worker has heard of that or not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class SliceClaim:
    """A slice of one holder on one worker: its epoch, and the bytes that it may use there, with its caches and margin.

    ``former`` is the epoch of the slice in whose place it comes, which serves until then; 0 for none.
    """

    epoch: int
    nbytes: int
    former: int = 0

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs of the slices that the worker keeps for it."""
        return (self.epoch, self.former) if self.former else (self.epoch,)


AllClaims: TypeAlias = frozenset[tuple[str, str, SliceClaim]]
"""Claims with the control addresses of their workers, and the names of their holders."""


class SliceClaims:
    """The claims of all holders, by the workers' control addresses. A holder has at most one slice on a worker.

    ``shared``: further holders may come, so that each must keep to its share of a worker's memory.
    """

    def __init__(self) -> None:
        self._claims: dict[str, dict[str, SliceClaim]] = {}
        self.shared = False

    def claim(self, holder: str, address: str, claim: SliceClaim) -> None:
        """Note what a holder loads on a worker, in place of its previous slice there."""
        self._claims = {known: found for known, found in self._claims.items() if found}
        found = self._claims.setdefault(address, {})
        if before := found.get(holder):
            again = before.epoch == claim.epoch
            claim = replace(claim, former=before.former if again else before.epoch)
        found[holder] = claim

    def inherit(self, holder: str, address: str, claim: SliceClaim) -> bool:
        """Claim a slice from before a restart for a holder that is yet to load. Return whether it was free."""
        found = self._claims.setdefault(address, {})
        free = holder not in found and all(claim.epoch not in other.epochs for other in found.values())
        if free:
            found[holder] = claim
        return free

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

    def holders(self, address: str) -> set[str]:
        """Return the names of all holders that have a claim on a worker."""
        return set(self._claims.get(address, {}))

    def others(self, holder: str, address: str) -> tuple[SliceClaim, ...]:
        """Return the claims of all other holders on a worker."""
        return tuple(claim for name, claim in self._claims.get(address, {}).items() if name != holder)

    def all_others(self, holder: str) -> AllClaims:
        """Return all claims of other holders."""
        return frozenset(
            (address, name, claim)
            for address, found in self._claims.items()
            for name, claim in found.items()
            if name != holder
        )

    def without(self, holders: Collection[str]) -> SliceClaims:
        """Return a copy without the claims of these holders."""
        left = SliceClaims()
        for address, found in self._claims.items():
            left._claims[address] = {name: claim for name, claim in found.items() if name not in holders}
        return left
