"""Reads the thinking switch and the reasoning effort from OpenAI requests.

Clients send them in a separate field or, as most clients of open models do, in ``chat_template_kwargs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from cluster.api.http.json_response import compact
from cluster.core.errors import InvalidRequest

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_KWARGS: Final = "chat_template_kwargs"
_SWITCHES: Final = ("enable_thinking", "thinking")
"""Template arguments that turn thinking on or off; the name depends on the model's template."""
_EFFORT: Final = "reasoning_effort"


@dataclass(frozen=True, slots=True)
class ReasoningFields:
    """The thinking switch and the effort; ``enable`` None and ``effort`` "" are the template's defaults.

    ``is_hint``: the switch follows from an effort of none, which a template may ignore as any other effort.
    ``template`` holds the remaining template arguments as JSON; empty if there are none.
    """

    enable: bool | None
    is_hint: bool
    effort: str
    template: str


def decode_thinking(effort: str | None, kwargs: Mapping[str, Any] | None, field: str) -> ReasoningFields:
    """Combine ``effort``, which the request has in ``field``, with the template arguments ``kwargs``.

    Raises ``InvalidRequest`` if they contradict each other or are invalid.
    """
    given = kwargs or {}
    efforts = {field: effort, f"{_KWARGS}.{_EFFORT}": _effort(given.get(_EFFORT))}
    enabled = {place: value != "none" for place, value in efforts.items() if value is not None}
    enabled |= {f"{_KWARGS}.{name}": _switch(name, given[name]) for name in _SWITCHES if given.get(name) is not None}
    if len(set(enabled.values())) > 1 or len({e for e in efforts.values() if e is not None}) > 1:
        *_, last = enabled
        raise InvalidRequest(f"{' and '.join(enabled)} contradict each other; send one of them", field=last)
    chosen = next((e for e in efforts.values() if e is not None), None)
    has_switch = any(given.get(name) is not None for name in _SWITCHES)
    enable = next(iter(enabled.values())) if has_switch or chosen == "none" else None
    rest = {name: value for name, value in given.items() if name not in (*_SWITCHES, _EFFORT)}
    level = "" if chosen in (None, "none") else chosen
    return ReasoningFields(enable, not has_switch, level, compact(rest) if rest else "")


def thinking_names(kwargs: Mapping[str, Any] | None, field: str) -> dict[str, str]:
    """Map validation's field names to those in the request; ``field`` is the request's separate effort field."""
    given = {name for name, value in (kwargs or {}).items() if value is not None}
    effort = f"{_KWARGS}.{_EFFORT}" if _EFFORT in given else field
    switch = next((f"{_KWARGS}.{name}" for name in _SWITCHES if name in given), effort)
    return {"enable_thinking": switch, "reasoning_effort": effort}


def _effort(value: object) -> str | None:
    if value is None or value in get_args(Effort):
        return value  # type: ignore[return-value]  # a member of Effort
    place = f"{_KWARGS}.{_EFFORT}"
    raise InvalidRequest(f"{place} must be one of {', '.join(get_args(Effort))}", field=place)


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    place = f"{_KWARGS}.{name}"
    raise InvalidRequest(f"{place} must be true or false", field=place)
