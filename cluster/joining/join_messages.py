"""The messages of a join, as JSON. Input of strangers is validated here, and errors do not repeat it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.core.errors import InvalidRequest, MacpipeError, Reason
from cluster.security.admission import AdmissionRequest
from cluster.security.limits import MAX_JOIN_VALUES, MAX_NAME_CHARS, MAX_PEM_BYTES

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
    """A request to join: the token's id and secret, a certificate request, and the Mac's clock (epoch seconds)."""

    token: Hex8
    secret: Hex32
    csr: Pem
    id: Hex16
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    clock: Seconds

    def admission_request(self) -> AdmissionRequest:
        return AdmissionRequest(
            self.token, bytes.fromhex(self.secret), self.csr.encode(), self.id, self.name, self.clock
        )


class JoinReply(_Form):
    """The reply: the certificate and the coordinator's clock."""

    certificate: Pem
    clock: Seconds


def _count_values(body: bytes) -> int:
    """Return an upper bound of the values in JSON, nested ones included: separators inside strings count as well."""
    return sum(map(body.count, (b",", b"[", b"{")))


def read_request(body: bytes) -> JoinRequest:
    """Parse a request. Raises ``InvalidRequest`` that names the wrong field, not its content."""
    if _count_values(body) > MAX_JOIN_VALUES:
        raise InvalidRequest(
            "the request to join has too many fields; install the same version of macpipe on both Macs"
        )
    try:
        return JoinRequest.model_validate_json(body)
    except ValidationError as e:
        field = ".".join(str(part) for part in e.errors(include_input=False)[0]["loc"])
        raise InvalidRequest(
            "this version of macpipe does not understand the request to join; install the same version on both Macs",
            field=field,
        ) from None


def read_reply(body: bytes) -> JoinReply:
    """Parse a reply. Raises ``ValueError``."""
    if _count_values(body) > MAX_JOIN_VALUES:
        raise ValueError("it has too many fields")
    try:
        return JoinReply.model_validate_json(body)
    except ValidationError:
        raise ValueError("this version of macpipe does not understand it; install the coordinator's version") from None


def write_refusal(error: MacpipeError) -> dict[str, Any]:
    """Return the body of an answer for a typed error."""
    retry = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
    return {"error": {"reason": error.reason, "message": error.sentence} | retry}


def read_refusal(body: bytes) -> MacpipeError | None:
    """Return the error in a coordinator's answer; None if the body has none."""
    try:
        fields = json.loads(body)["error"]
        reason, message = str(fields["reason"])[:64], str(fields["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return MacpipeError.of(Reason.parse(reason), "".join(c for c in message if c.isprintable()))
