"""A request's body: read within bounds, then checked against its form. Every refusal names the field."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, Final, TypeVar

import anyio
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json
from starlette.requests import ClientDisconnect, Request

from cluster.api.bounds import MAX_ELEMENTS, MAX_JSON_VALUES, MAX_NAME_CHARS
from cluster.api.byte_budget import Charge
from cluster.api.elements import ElementCounter
from cluster.core.errors import Aborted, DeadlineExceeded, InvalidRequest, TooLarge
from cluster.core.limits import BODY_TIMEOUT_S, KIB, MAX_BODY_BYTES, MAX_PROMPT_CHARS, MIB

LARGE: Final = 64 * KIB
"""Above this a body is parsed and translated off the event loop, one at a time: the largest takes 0.1 s in all."""
CHARGE: Final = "macpipe.charge"
"""In a request's scope: the ``Charge`` that counts the bytes of its body."""
MAX_FIELD_CHARS: Final = 256
"""Of the field that an error names, where its parts are names of the client's."""
_parsing: Final = anyio.CapacityLimiter(1)


class Form(BaseModel):
    """A JSON object as a client sends it: no field that is not named here, no string where a number is due.

    ``most_commas`` bounds the commas of a whole body of this form.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    most_commas: ClassVar[int] = MAX_ELEMENTS

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, value: Any) -> Any:
        """Drop all unknown fields but the first, since each would get an error of its own, and one is shown."""
        known = _names_of(cls)
        if not isinstance(value, dict) or value.keys() <= known:
            return value
        unknown = next(name for name in value if name not in known)
        return {name: field for name, field in value.items() if name in known} | {unknown: value[unknown]}


@functools.cache
def _names_of(form: type[Form]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in form.model_fields.items())


def _refuse(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported here; leave it out")


def _drop(value: object) -> None:
    """Keep nothing of a value that nobody reads."""


def _bound_values(value: object) -> object:
    """Refuse an object of too many values, before each of them is looked at."""
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        count += len(inner)
        if count > MAX_JSON_VALUES:
            raise PydanticCustomError(
                "too_many_values", "at most {most} values can be in it", {"most": MAX_JSON_VALUES}
            )
        waiting.extend(inner)
    return value


Unsupported = Annotated[Any, AfterValidator(_refuse), WithJsonSchema({"type": "null"})]
"""A field that the API we follow has and we have not: null, or a 400 that says so."""
Ignored = Annotated[Any, AfterValidator(_drop), WithJsonSchema({})]
"""A field that changes no answer in the API we follow either: notes of the client's, hints for caches and billing."""
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
"""What the model reads."""
ShortText = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
"""A name or an id."""
JsonObject = Annotated[dict[str, Any], BeforeValidator(_bound_values)]
"""An object whose fields are the client's own: a schema, arguments."""
F = TypeVar("F", bound=Form)
T = TypeVar("T")


def first_entries(most: int) -> BeforeValidator:
    """Keep of an object the first ``most`` + 1 entries: the bound refuses them, and no further one gets an error."""
    return BeforeValidator(lambda value: dict(islice(value.items(), most + 1)) if isinstance(value, dict) else value)


async def read(request: Request, form: type[F]) -> F:
    """The request's body as ``form``. Raises ``InvalidRequest``, ``TooLarge``, ``Busy`` or ``DeadlineExceeded``."""
    body = await _receive_body(request, ElementCounter(form.most_commas))
    if len(body) > LARGE:
        return await anyio.to_thread.run_sync(_parse, body, form, limiter=_parsing)
    return _parse(body, form)


async def build(request: Request, make: Callable[[], T]) -> T:
    """What ``make`` makes of the form that was read from ``request``; off the event loop where the body was large."""
    charge: Charge = request.scope[CHARGE]
    return await anyio.to_thread.run_sync(make, limiter=_parsing) if charge.size > LARGE else make()


async def _receive_body(request: Request, elements: ElementCounter) -> bytearray:
    stated = request.headers.get("content-length", "0")
    if not (stated.isascii() and stated.isdigit()):
        raise InvalidRequest("the header content-length is no number", field="content-length")
    if len(stated) > len(str(MAX_BODY_BYTES)) or int(stated) > MAX_BODY_BYTES:
        raise _too_large()
    charge: Charge = request.scope[CHARGE]
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                if len(body) + len(part) > MAX_BODY_BYTES:
                    raise _too_large()
                charge.add(len(part))
                elements.feed(part)
                body += part
    except TimeoutError:
        raise DeadlineExceeded(f"the request's body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    except ClientDisconnect:
        raise Aborted("the client went away") from None
    return body


def _too_large() -> TooLarge:
    return TooLarge(f"the request's body is longer than {MAX_BODY_BYTES // MIB} MiB")


def parse(body: bytes, form: type[F]) -> F:
    """``body`` as ``form``. Raises ``TooLarge``, and ``InvalidRequest`` for the first field that is wrong."""
    ElementCounter(form.most_commas).feed(body)
    return _parse(body, form)


def _parse(body: bytes | bytearray, form: type[F]) -> F:
    """The same for a body whose elements were counted. Parsing and validating hold the GIL, each for at most 50 ms."""
    if not body.strip():
        raise InvalidRequest("the request has no body; send a JSON object")
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise InvalidRequest(f"the body is not JSON: {e}", code="invalid_json") from None
    try:
        return form.model_validate(parsed)
    except ValidationError as e:
        raise _refusal(max(e.errors(include_url=False, include_input=False), key=_weight)) from None


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
    if not error["loc"]:
        return InvalidRequest("the body must be a JSON object", code="invalid_json")
    field = field_name(error["loc"], whole=kind in _OF_FIELDS)
    told, code = _SENTENCES.get(kind, (f": {_describe_error(error)}", "invalid_value"))
    return InvalidRequest(f"{field}{told}", field=field, code=code)


_SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "extra_forbidden": (" is not a parameter of this request", "unknown_parameter"),
    "missing": (" is missing", "missing_required_parameter"),
    "unsupported": (" is not supported here; leave it out", "unsupported_parameter"),
}


_OF_FIELDS: Final = frozenset({"extra_forbidden", "missing"})
"""What is wrong is that a field is there, or is not: its name, whatever that is, ends the place."""


def _describe_error(error: ErrorDetails) -> str:
    """What is wrong, in JSON's words."""
    bounds = error.get("ctx", {})
    if error["type"] == "too_long":
        return f"at most {bounds['max_length']} entries can be given"
    if error["type"] == "too_short":
        return f"at least {bounds['min_length']} entry must be given"
    if error["type"] in _OBJECTS:
        return "input should be an object"
    if error["type"] == "list_type":
        return "input should be an array"
    if error["type"] == "string_pattern_mismatch":
        return "letters, digits, _ and - can be in it, and nothing else"
    said = error["msg"]
    for python, json in _WORDS:
        said = said.replace(python, json)
    return said[:1].lower() + said[1:]


_OBJECTS: Final = frozenset({"model_type", "model_attributes_type", "dict_type"})
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
        if len(name) > MAX_FIELD_CHARS:
            return name[:MAX_FIELD_CHARS] + "…"
    return name


def _is_field(part: str) -> bool:
    """Whether it can be a field's name: branches are named after types, like ``constrained-str`` and ``list[Part]``."""
    return part.removeprefix("constrained-") not in _BRANCHES and "[" not in part and not part[:1].isupper()


_BRANCHES: Final = frozenset({"str", "int", "float", "bool", "none", "dict", "is-instance"})
