"""What the two sides of a join say to each other, as JSON. What a stranger sent is checked here, and not repeated."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.security.admission import AdmissionRequest
from cluster.security.bounds import MAX_JOIN_VALUES, MAX_NAME_CHARS, MAX_PEM_BYTES

AUTHORITY: Final = "/authority"
JOIN: Final = "/join"
Hex8 = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", repr=False)]
Seconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Pem = Annotated[str, Field(max_length=MAX_PEM_BYTES, pattern=r"^[\x0a\x0d\x20-\x7e]*$")]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class JoinRequest(_Form):
    """What a Mac says that wants in: the token's id and secret, what to certify, and its own clock (epoch seconds)."""

    token: Hex8
    secret: Hex32
    csr: Pem
    id: Hex16
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    clock: Seconds

    def wish(self) -> AdmissionRequest:
        return AdmissionRequest(
            self.token, bytes.fromhex(self.secret), self.csr.encode(), self.id, self.name, self.clock
        )


class JoinReply(_Form):
    """What it gets: its certificate, and the coordinator's clock."""

    certificate: Pem
    clock: Seconds


def _values(body: bytes) -> int:
    """At least as many as the values in JSON, those of lists in lists included; marks within texts count as well."""
    return sum(map(body.count, (b",", b"[", b"{")))


def read_ask(body: bytes) -> JoinRequest:
    """Raises ``InvalidRequest``, which names the field that is wrong and not what it held."""
    if _values(body) > MAX_JOIN_VALUES:
        raise InvalidRequest("this is not a request to join: it has more fields than one has")
    try:
        return JoinRequest.model_validate_json(body)
    except ValidationError as e:
        field = ".".join(str(part) for part in e.errors(include_input=False)[0]["loc"])
        raise InvalidRequest(
            "this is not a request to join that this version of macpipe understands", field=field
        ) from None


def read_answer(body: bytes) -> JoinReply:
    """Raises ``ValueError``."""
    if _values(body) > MAX_JOIN_VALUES:
        raise ValueError("the answer has more fields than one has")
    try:
        return JoinReply.model_validate_json(body)
    except ValidationError:
        raise ValueError("the answer is not one that this version of macpipe understands") from None


def refusal(error: MacpipeError) -> dict[str, Any]:
    """A typed error as the body of an answer."""
    retry = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
    return {"error": {"reason": error.reason, "message": error.sentence} | retry}


def read_refusal(body: bytes) -> MacpipeError | None:
    """The error that a coordinator answered with, None where the body says none."""
    try:
        said = json.loads(body)["error"]
        reason, message = str(said["reason"])[:64], str(said["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return MacpipeError.of(reason, "".join(c for c in message if c.isprintable()))
