"""The join service's two routes: the authority's certificate, for all, and a certificate for who has a token."""

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
from cluster.joining.join_forms import AUTHORITY, JOIN, JoinReply, read_ask, refusal
from cluster.security.admission import Admission
from cluster.security.bounds import MAX_JOIN_BYTES, WRONG_SECRETS
from cluster.security.tokens import WrongSecret

log = logging.getLogger(__name__)

_DESKS = 2
"""Requests decided at once; each waits for the folder's lock, and writes."""


class GuessLimiter:
    """How often wrong secrets get an answer to themselves. Who has the right one never waits for those."""

    def __init__(self, a_second: float = WRONG_SECRETS, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = a_second, clock
        self._left, self._then = a_second, clock()

    def allow(self) -> bool:
        """Whether one more is within the rate; it is counted."""
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class JoinService:
    """Answers for one cluster. Its log names who came in, and why others did not; no token and no request is in it."""

    def __init__(self, admission: Admission, clock: Callable[[], float] = time.time) -> None:
        self._admission, self._clock = admission, clock
        self._desks = CapacityLimiter(_DESKS)
        self._guesses = GuessLimiter()

    def application(self) -> Starlette:
        return Starlette(routes=[Route(AUTHORITY, self.authority), Route(JOIN, self.join, methods=["POST"])])

    async def authority(self, _: Request) -> Response:
        """The certificate that a token pins, and by the usual header what time it is here."""
        now = {"date": formatdate(self._clock(), usegmt=True)}
        return Response(self._admission.authority.certificate, media_type="application/x-pem-file", headers=now)

    async def join(self, request: Request) -> Response:
        """A certificate, or a typed error."""
        try:
            ask = read_ask(await _body(request))
            certificate = await anyio.to_thread.run_sync(self._admission.admit, ask.wish(), limiter=self._desks)
        except MacpipeError as e:
            return self._refuse(e)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:  # the service's edge: one request fails, with our log naming why
            log.exception("a request to join failed")
            return self._refuse(MacpipeError("the coordinator could not admit this Mac; its log says why"))
        log.info("%s joined the cluster", ask.name)
        return JSONResponse(JoinReply(certificate=certificate.decode(), clock=self._clock()).model_dump())

    def _refuse(self, error: MacpipeError) -> Response:
        if isinstance(error, WrongSecret) and not self._guesses.allow():
            error = Busy("too many wrong tokens were tried; try again in a second", retry_after_s=1.0)
        else:
            log.info("a request to join was refused: %s", error.reason)
        return JSONResponse(refusal(error), status_code=error.http_status)


async def _body(request: Request) -> bytes:
    """The body, of which no more is kept than may be there; the port bounds the time that it takes."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_JOIN_BYTES:
            raise TooLarge("a request to join is shorter")
    return bytes(body)
