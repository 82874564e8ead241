"""Choose the standby to which a leader hands over."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.errors import InvalidRequest, NotServing
from cluster.core.leadership import CoordinatorName, StandbyState
from cluster.security.roles import coordinators_named

__all__ = ["choose_heir"]


def choose_heir(name: str, me: CoordinatorName, standbys: Sequence[StandbyState], *, any_copy: bool) -> StandbyState:
    """Return the standby of the leader ``me`` that ``name`` means, the coordinator's or its Mac's; "" means any.

    It must be in sync, unless ``any_copy``: no journal is replicated. Raises ``NotServing`` if there is none that can
    take over now, ``InvalidRequest`` if the name is the leader's own.
    """
    found = coordinators_named(name, standbys) if name else standbys
    ready = [one for one in found if one.in_sync or any_copy]
    if ready:
        return ready[0]
    if found:
        why = found[0].problem or "it is behind"
        raise NotServing(f"{found[0].name} cannot take over without losing answers: {why}", retry_after_s=1.0)
    others = f"; standbys are {', '.join(one.name for one in standbys)}" if standbys and name else ""
    if name and coordinators_named(name, [me]):
        raise InvalidRequest(f"{me.name} leads already, so it needs no handover{others}", field="standby")
    which = f"no standby named {name[:64]}" if name else "no standby"
    raise NotServing(f"{which} follows this coordinator{others}; start one with `macpipe serve --standby`")
