"""The join service's two routes: the authority's certificate, for everybody, and a certificate for a valid token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from email.utils import formatdate

import anyio
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.core.errors import Busy, MacpipeError, TooLarge
from cluster.joining.join_messages import AUTHORITY, JOIN, JoinReply, read_request, write_refusal
from cluster.security.admission import Admission
from cluster.security.limits import MAX_JOIN_BYTES, WRONG_SECRETS
from cluster.security.tokens import WrongSecret

log = logging.getLogger(__name__)

_ADMISSIONS_AT_ONCE = 2
"""Requests that are decided at once. Each waits for the folder's lock and writes to the disk."""


class GuessLimiter:
    """Limits how often a wrong secret gets an answer of its own. A request with a right secret never waits."""

    def __init__(self, a_second: float = WRONG_SECRETS, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = a_second, clock
        self._left, self._then = a_second, clock()

    def allow(self) -> bool:
        """Return whether one more answer is within the rate, and count it."""
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class JoinService:
    """Answers requests to join one cluster. Its log has names and reasons of refusals, but no token and no request."""

    def __init__(self, admission: Admission, clock: Callable[[], float] = time.time) -> None:
        self._admission, self._clock = admission, clock
        self._admissions = CapacityLimiter(_ADMISSIONS_AT_ONCE)
        self._guesses = GuessLimiter()

    def application(self) -> Starlette:
        return Starlette(routes=[Route(AUTHORITY, self.authority), Route(JOIN, self.join, methods=["POST"])])

    async def authority(self, _: Request) -> Response:
        """Return the certificate that a token pins; the date header has this Mac's time."""
        now = {"date": formatdate(self._clock(), usegmt=True)}
        return Response(self._admission.authority.certificate, media_type="application/x-pem-file", headers=now)

    async def join(self, request: Request) -> Response:
        """Return a certificate, or a typed error."""
        try:
            join_request = read_request(await _read_body(request))
            certificate = await anyio.to_thread.run_sync(
                self._admission.admit, join_request.admission_request(), limiter=self._admissions
            )
        except MacpipeError as e:
            return self._refuse(e)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:  # the service's edge: one request fails, and the log names the cause
            log.exception("join: failed")
            return self._refuse(MacpipeError("the coordinator could not admit this Mac; its log has the cause"))
        log.info("join: admitted name=%s", join_request.name)
        return JSONResponse(JoinReply(certificate=certificate.decode(), clock=self._clock()).model_dump())

    def _refuse(self, error: MacpipeError) -> Response:
        if isinstance(error, WrongSecret) and not self._guesses.allow():
            error = Busy("there were too many wrong tokens; try again in a second", retry_after_s=1.0)
        else:
            log.info("join: refused code=%s", error.reason)
        return JSONResponse(write_refusal(error), status_code=error.http_status)


async def _read_body(request: Request) -> bytes:
    """Return the body. Raises ``TooLarge`` above ``MAX_JOIN_BYTES``; the port bounds its time."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_JOIN_BYTES:
            raise TooLarge(f"the request to join is too long; at most {MAX_JOIN_BYTES} bytes are allowed")
    return bytes(body)
