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
        # One error is told: of a union's branches, the one that came furthest is what was meant; and a type that is
        # not known says more than the fields that it lacks.
        errors = e.errors(include_url=False, include_context=False)
        raise _refusal(max(errors, key=lambda error: (len(error["loc"]), error["type"] == "literal_error"))) from None


def _refusal(error: ErrorDetails) -> InvalidRequest:
    kind = error["type"]
    if kind == "json_invalid":
        return InvalidRequest(
            f"the body is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    field = field_name(error["loc"])
    if not field:
        return InvalidRequest("the body must be a JSON object", code="invalid_json")
    told, code = _SENTENCES.get(kind, (f": {_lower(error['msg'])}", "invalid_value"))
    return InvalidRequest(f"{field}{told}", field=field, code=code)


_SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "extra_forbidden": (" is not a parameter of this request", "unknown_parameter"),
    "missing": (" is missing", "missing_required_parameter"),
    "unsupported": (" is not supported here; leave it out", "unsupported_parameter"),
}


def field_name(location: tuple[int | str, ...]) -> str:
    """``messages[0].content`` of a place in the body; names of a union's branches are left out."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif _is_field(part):
            name += f".{part}" if name else part
    return name


def _is_field(part: str) -> bool:
    """Whether it can be a field's name: branches are named after types, like ``str`` and ``list[Part]``."""
    return part not in _BRANCHES and "[" not in part and not part[:1].isupper()


_BRANCHES: Final = frozenset({"str", "int", "float", "bool", "none", "dict", "is-instance"})


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
