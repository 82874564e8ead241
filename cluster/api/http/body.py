"""Reads a request's body within bounds and validates it against its form. Every error names the field."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json
from starlette.requests import ClientDisconnect, Request

from cluster.api.http.adjustments import adjustments_of
from cluster.api.json_elements import ElementCounter
from cluster.api.limits import MAX_ELEMENTS, MAX_JSON_VALUES, MAX_NAME_CHARS
from cluster.core.errors import Aborted, DeadlineExceeded, InvalidRequest, TooLarge
from cluster.core.limits import BODY_TIMEOUT_S, KIB, MAX_BODY_BYTES, MAX_PROMPT_BYTES, MIB
from cluster.transport.byte_budget import Charge
from cluster.transport.parsing_thread import PARSING

CHARGE: Final = "macpipe.charge"
"""Key in the ASGI scope: the ``Charge`` of the request's body."""
UNKNOWN_TOOL: Final = "unknown_tool"
"""The kind of error of a tool without a schema whose type is not known."""
MAX_FIELD_CHARS: Final = 256
"""Characters of a field name in an error; its parts may be names that the client chose."""


class Form(BaseModel):
    """A JSON object as a client sends it. Unknown fields and type coercion (a string for a number) are rejected.

    ``most_commas`` and ``most_bytes`` bound the commas and the bytes in a body of this form.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    most_commas: ClassVar[int] = MAX_ELEMENTS
    most_bytes: ClassVar[int] = MAX_BODY_BYTES

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, value: Any) -> Any:
        """Drop all unknown fields but the first: each would cost an error, and only one error is shown."""
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


def _refuse_set(value: object) -> None:
    if value:
        _refuse(value)


def _drop(value: object) -> None:
    """Replace an ignored value with None."""


def note_ignored(info: ValidationInfo, field: str) -> None:
    """Note that the request has ``field``, which has no effect here. ``read`` collects these notes."""
    if info.context is not None:
        info.context[field] = None


def _drop_hint(value: object, info: ValidationInfo) -> None:
    """Replace a hint with None, and note its name if it asks for something."""
    if value:
        note_ignored(info, info.field_name or "")


def hint(name: str) -> AfterValidator:
    """Return a validator that notes a value of the field ``name`` (its whole path) as ignored."""

    def note(value: T, info: ValidationInfo) -> T:
        if value:
            note_ignored(info, name)
        return value

    return AfterValidator(note)


def _bound_values(value: object) -> object:
    """Reject a JSON value with too many values inside, before they are validated."""
    pending = [value]
    count = 0
    while pending:
        one = pending.pop()
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        count += len(inner)
        if count > MAX_JSON_VALUES:
            raise PydanticCustomError(
                "too_many_values", "it must have at most {most} values", {"most": MAX_JSON_VALUES}
            )
        pending.extend(inner)
    return value


Unsupported = Annotated[Any, AfterValidator(_refuse), WithJsonSchema({"type": "null"})]
"""A field that the original API has and macpipe does not support: null, else a 400 that says so."""
Unset = Annotated[Any, AfterValidator(_refuse_set), WithJsonSchema({"type": "null"})]
"""An unsupported field that clients also send without a value: empty, false or zero."""
Ignored = Annotated[Any, AfterValidator(_drop), WithJsonSchema({})]
"""A field that asks for nothing, such as a part of an earlier answer that the client sends back."""
Hint = Annotated[Any, AfterValidator(_drop_hint), WithJsonSchema({})]
"""A field that does not change what an answer means, such as a note or a hint for caches. The client is told."""
Text = Annotated[str, Field(max_length=MAX_PROMPT_BYTES)]
"""Text that becomes part of the prompt, whose bytes are counted later."""
ShortText = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
"""A name or an id."""
JsonObject = Annotated[dict[str, Any], BeforeValidator(_bound_values)]
"""An object whose fields the client defines: a schema, or arguments."""
F = TypeVar("F", bound=Form)
T = TypeVar("T")


def first_entries(most: int) -> BeforeValidator:
    """Keep only the first ``most`` + 1 entries of an object: enough to break the bound, and to bound the errors."""
    return BeforeValidator(lambda value: dict(islice(value.items(), most + 1)) if isinstance(value, dict) else value)


async def read(request: Request, form: type[F]) -> F:
    """Read the request's body as ``form``.

    Raises ``InvalidRequest``, ``TooLarge``, ``Busy``, ``DeadlineExceeded``, or ``Aborted`` if the client disconnects.
    """
    body = await _receive_body(request, ElementCounter(form.most_commas), form.most_bytes)
    hints: dict[str, None] = {}
    parsed = await PARSING.run(len(body), _parse, body, form, hints)
    adjustments_of(request.scope).ignore(hints)
    return parsed


async def build(request: Request, make: Callable[[], T]) -> T:
    """Return ``make()``, which translates the request's form; in a thread if the body was large. Raises ``Busy``."""
    return await PARSING.run(form_size(request), make)


def form_size(request: Request) -> int:
    """Return the bytes of the body that was read."""
    return charge_of(request).size


def charge_of(request: Request) -> Charge:
    """Return the charge of what the request holds until it ends: its body, then the answer that is collected."""
    charge: Charge = request.scope[CHARGE]
    return charge


async def _receive_body(request: Request, elements: ElementCounter, most: int) -> bytearray:
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise InvalidRequest(
            "the header content-length is not a number; send the body's length in bytes", field="content-length"
        )
    if len(length) > len(str(most)) or int(length) > most:
        raise _too_large(most)
    charge: Charge = request.scope[CHARGE]
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                if len(body) + len(part) > most:
                    raise _too_large(most)
                charge.add(len(part))
                await PARSING.run(len(part), elements.feed, part)
                body += part
    except TimeoutError:
        raise DeadlineExceeded(f"the request's body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    except ClientDisconnect:
        raise Aborted("the client disconnected") from None
    return body


def _too_large(most: int) -> TooLarge:
    size = f"{most // MIB} MiB" if most >= MIB else f"{most // KIB} KiB"
    return TooLarge(f"the request's body is longer than {size}; send a shorter one")


def parse(body: bytes, form: type[F]) -> F:
    """Parse ``body`` as ``form``. Raises ``TooLarge``, and ``InvalidRequest`` for an invalid field."""
    ElementCounter(form.most_commas).feed(body)
    return _parse(body, form, {})


def _parse(body: bytes | bytearray, form: type[F], hints: dict[str, None]) -> F:
    """Parse a body whose elements were counted, and add the names of the hints in it to ``hints``.

    Parsing and validating hold the GIL for at most 50 ms each.
    """
    if not body.strip():
        raise InvalidRequest("the request has no body; send a JSON object")
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise InvalidRequest(f"the body is not JSON: {e}", code="invalid_json") from None
    try:
        return form.model_validate(parsed, context=hints)
    except ValidationError as e:
        raise _invalid_request(max(e.errors(include_url=False, include_input=False), key=_relevance)) from None


def _relevance(error: ErrorDetails) -> tuple[bool, int, int]:
    """Return the sort key of an error; only the most relevant error is shown.

    A value of a union type has errors for each branch. A broken bound means that the branch was right, so it comes
    first. Else the deepest error belongs to the branch that the client meant. An unknown ``type`` explains more than
    the fields that are missing for it, and a tool's says what to do.
    """
    kind = error["type"]
    return kind.startswith(_BOUNDS), len(error["loc"]), _TYPE_ERRORS.get(kind, 0)


_TYPE_ERRORS: Final[Mapping[str, int]] = {"literal_error": 1, UNKNOWN_TOOL: 2}
_BOUNDS: Final = ("too_", "string_too_", "string_pattern", "greater_than", "less_than")


def _invalid_request(error: ErrorDetails) -> InvalidRequest:
    kind = error["type"]
    if not error["loc"]:
        return InvalidRequest("the body must be a JSON object", code="invalid_json")
    field = field_name(error["loc"], whole=kind in _FIELD_ERRORS)
    description, code = _SENTENCES.get(kind, (f": {_describe_error(error)}", "invalid_value"))
    return InvalidRequest(f"{field}{description}", field=field, code=code)


_SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "extra_forbidden": (" is not a parameter of this request", "unknown_parameter"),
    "missing": (" is missing", "missing_required_parameter"),
    "unsupported": (" is not supported here; leave it out", "unsupported_parameter"),
}


_FIELD_ERRORS: Final = frozenset({"extra_forbidden", "missing"})
"""Errors about the presence of a field: the last part of their location is always a field name."""


def _describe_error(error: ErrorDetails) -> str:
    """Describe an error in JSON's terms."""
    bounds = error.get("ctx", {})
    if error["type"] == "too_long":
        return f"it must have at most {bounds['max_length']} entries"
    if error["type"] == "too_short":
        return f"it must have at least {bounds['min_length']} entry"
    if error["type"] in _OBJECTS:
        return "input should be an object"
    if error["type"] == "list_type":
        return "input should be an array"
    if error["type"] == "string_pattern_mismatch":
        return "it may have only letters, digits, _ and -"
    message = error["msg"]
    for python, json in _WORDS:
        message = message.replace(python, json)
    return message[:1].lower() + message[1:]


_OBJECTS: Final = frozenset({"model_type", "model_attributes_type", "dict_type"})
_WORDS: Final = ((" should be False", " should be false"), (" should be True", " should be true"))


def field_name(location: tuple[int | str, ...], *, whole: bool = False) -> str:
    """Return a location in the body in the form ``messages[0].content``, without the names of union branches.

    ``whole``: the last part is always a field name.
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
    """Return whether a part is a field name. Union branches have type names: ``constrained-str``, ``list[Part]``."""
    return part.removeprefix("constrained-") not in _BRANCHES and "[" not in part and not part[:1].isupper()


_BRANCHES: Final = frozenset({"str", "int", "float", "bool", "none", "dict", "is-instance"})
