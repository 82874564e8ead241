"""A request's body: read within bounds, then checked against its form. Every refusal names the field."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

import anyio
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import ClientDisconnect, Request

from cluster.errors import Aborted, DeadlineExceeded, InvalidRequest, TooLarge
from cluster.limits import BODY_TIMEOUT_S, KIB, MAX_BODY_BYTES, MIB

LARGE: Final = 256 * KIB
"""Above this a body is parsed off the event loop: 16 MiB take a tenth of a second."""


class Form(BaseModel):
    """A JSON object as a client sends it: no field that is not named here, no string where a number is due."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported here; leave it out")


Unsupported = Annotated[Any, AfterValidator(_refuse), WithJsonSchema({"type": "null"})]
"""A field that the API we follow has and we have not: null, or a 400 that says so."""
Ignored = Annotated[Any, WithJsonSchema({})]
"""A field that changes no answer in the API we follow either: notes of the client's, hints for caches and billing."""
F = TypeVar("F", bound=Form)


async def read(request: Request, form: type[F]) -> F:
    """The request's body as ``form``. Raises ``InvalidRequest``, ``TooLarge`` or ``DeadlineExceeded``."""
    body = await _bytes(request)
    if len(body) > LARGE:
        return await anyio.to_thread.run_sync(parse, body, form)
    return parse(body, form)


async def _bytes(request: Request) -> bytes:
    stated = request.headers.get("content-length", "0")
    if not (stated.isascii() and stated.isdigit()):
        raise InvalidRequest("the header content-length is no number", field="content-length")
    if len(stated) > len(str(MAX_BODY_BYTES)) or int(stated) > MAX_BODY_BYTES:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                parts.append(part)
    except TimeoutError:
        raise DeadlineExceeded(f"the request's body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    except ClientDisconnect:
        raise Aborted("the client went away") from None
    return b"".join(parts)


def _too_large() -> TooLarge:
    return TooLarge(f"the request's body is longer than {MAX_BODY_BYTES // MIB} MiB")


def parse(body: bytes, form: type[F]) -> F:
    """``body`` as ``form``. Raises ``InvalidRequest`` for the first field that is wrong."""
    if not body.strip():
        raise InvalidRequest("the request has no body; send a JSON object")
    try:
        return form.model_validate_json(body)
    except ValidationError as e:
        raise _refusal(max(e.errors(include_url=False), key=_weight)) from None


def _weight(error: ErrorDetails) -> tuple[bool, int, bool]:
    """One error is told, the one that weighs most. Where a value may be of several kinds, each kind has its own errors.

    What only breaks a bound was of the right kind; else the kind that came furthest is what was meant; and a type that
    is not known says more than the fields that it lacks.
    """
    kind = error["type"]
    return kind.startswith(_BOUNDS), len(error["loc"]), kind == "literal_error"


_BOUNDS: Final = ("too_", "string_too_", "string_pattern", "greater_than", "less_than")


def _refusal(error: ErrorDetails) -> InvalidRequest:
    kind = error["type"]
    if kind == "json_invalid":
        return InvalidRequest(
            f"the body is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if not error["loc"]:
        return InvalidRequest("the body must be a JSON object", code="invalid_json")
    field = field_name(error["loc"], whole=kind in _OF_FIELDS)
    told, code = _SENTENCES.get(kind, (f": {_told(error)}", "invalid_value"))
    return InvalidRequest(f"{field}{told}", field=field, code=code)


_SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "extra_forbidden": (" is not a parameter of this request", "unknown_parameter"),
    "missing": (" is missing", "missing_required_parameter"),
    "unsupported": (" is not supported here; leave it out", "unsupported_parameter"),
}


_OF_FIELDS: Final = frozenset({"extra_forbidden", "missing"})
"""What is wrong is that a field is there, or is not: its name, whatever that is, ends the place."""


def _told(error: ErrorDetails) -> str:
    """What is wrong, in JSON's words."""
    bounds = error.get("ctx", {})
    if error["type"] == "too_long":
        return f"at most {bounds['max_length']} entries can be given"
    if error["type"] == "too_short":
        return f"at least {bounds['min_length']} entry must be given"
    if error["type"] == "string_pattern_mismatch":
        return "letters, digits, _ and - can be in it, and nothing else"
    said = error["msg"]
    for python, json in _WORDS:
        said = said.replace(python, json)
    return said[:1].lower() + said[1:]


_WORDS: Final = ((" should be False", " should be false"), (" should be True", " should be true"))


def field_name(location: tuple[int | str, ...], *, whole: bool = False) -> str:
    """``messages[0].content`` of a place in the body; names of a union's branches are left out.

    ``whole``: its last part is a field's name in any case.
    """
    name = ""
    for i, part in enumerate(location, 1):
        if isinstance(part, int):
            name += f"[{part}]"
        elif _is_field(part) or (whole and i == len(location)):
            name += f".{part}" if name else part
    return name


def _is_field(part: str) -> bool:
    """Whether it can be a field's name: branches are named after types, like ``constrained-str`` and ``list[Part]``."""
    return part.removeprefix("constrained-") not in _BRANCHES and "[" not in part and not part[:1].isupper()


_BRANCHES: Final = frozenset({"str", "int", "float", "bool", "none", "dict", "is-instance"})
