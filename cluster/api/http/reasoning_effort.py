"""Whether and how hard to think, as OpenAI's clients say it.

In a field of its own, or, as most clients of open models do, among the arguments of the model's template.
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
"""Templates differ in the name; both mean the same."""
_EFFORT: Final = "reasoning_effort"


@dataclass(frozen=True, slots=True)
class ReasoningFields:
    """``enable`` None and ``effort`` "" leave it to the template, whose further arguments are ``template``, as JSON."""

    enable: bool | None
    effort: str
    template: str


def thinking_of(effort: str | None, kwargs: Mapping[str, Any] | None, field: str) -> ReasoningFields:
    """What ``effort``, the request's ``field``, and the template's arguments say together.

    Raises ``InvalidRequest`` where they contradict each other, or are none.
    """
    given = kwargs or {}
    efforts = {field: effort, f"{_KWARGS}.{_EFFORT}": _effort(given.get(_EFFORT))}
    said = {place: value != "none" for place, value in efforts.items() if value is not None}
    said |= {f"{_KWARGS}.{name}": _switch(name, given[name]) for name in _SWITCHES if given.get(name) is not None}
    if len(set(said.values())) > 1 or len({e for e in efforts.values() if e is not None}) > 1:
        *_, last = said
        raise InvalidRequest(f"{' and '.join(said)} contradict each other; give one of them", field=last)
    wanted = next((e for e in efforts.values() if e is not None), None)
    switched = any(given.get(name) is not None for name in _SWITCHES)
    enable = next(iter(said.values())) if switched or wanted == "none" else None
    rest = {name: value for name, value in given.items() if name not in (*_SWITCHES, _EFFORT)}
    return ReasoningFields(enable, "" if wanted in (None, "none") else wanted, compact(rest) if rest else "")


def thinking_fields(kwargs: Mapping[str, Any] | None, field: str) -> dict[str, str]:
    """What the intake's names for it are called where they came from; ``field`` is the effort's own."""
    given = {name for name, value in (kwargs or {}).items() if value is not None}
    effort = f"{_KWARGS}.{_EFFORT}" if _EFFORT in given else field
    switch = next((f"{_KWARGS}.{name}" for name in _SWITCHES if name in given), effort)
    return {"enable_thinking": switch, "reasoning_effort": effort}


def _effort(value: object) -> str | None:
    if value is None or value in get_args(Effort):
        return value  # type: ignore[return-value]  # one of the words
    place = f"{_KWARGS}.{_EFFORT}"
    raise InvalidRequest(f"{place} must be one of {', '.join(get_args(Effort))}", field=place)


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    place = f"{_KWARGS}.{name}"
    raise InvalidRequest(f"{place} must be true or false", field=place)
