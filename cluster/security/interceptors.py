"""Authorize every call of every server in a cluster: identify the caller and check its role.

TLS admits only holders of the cluster's certificates. The interceptors check their roles and refuse revoked ones. They
end the streams of a party that is revoked meanwhile. The cost is one look-up per call, one a second for each open call
(on an asyncio server, for each open stream), and nothing per message.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeAlias

import grpc
from grpc import aio

from cluster.core.errors import MacpipeError
from cluster.security.access_rules import RULES, is_allowed
from cluster.security.limits import REVOCATION_LOOK_S
from cluster.security.passed_caller import (
    caller_certificate,
    connection_certificate,
    is_coordinator,
    is_passed,
    passed_certificate,
)
from cluster.security.roles import Party, Role
from cluster.security.trust import PASSER_REMOVED_METADATA, REMOVED_METADATA, AuthContext, Trust

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "aio.ServicerContext[Any, Any]"
Metadata: TypeAlias = tuple[tuple[str, str], ...]
Refusal = tuple[grpc.StatusCode, str, Metadata]
"""Status, message and trailing metadata of a call that is refused."""


def authorize(trust: Trust, method: str, shown: AuthContext) -> Party | Refusal:
    """Return the caller of ``method`` if it may call it, else the refusal."""
    party = trust.party(shown)
    if party is None:
        return grpc.StatusCode.UNAUTHENTICATED, "this needs a valid certificate of the cluster; see `macpipe join`", ()
    if refusal := _find_revocation(trust, party):
        return refusal
    if not is_allowed(method, party.role):
        return grpc.StatusCode.PERMISSION_DENIED, _explain_role(method, party), ()
    return party


def _explain_role(method: str, party: Party) -> str:
    allowed = RULES.get(method, frozenset())
    roles = " or ".join(sorted(allowed)) or "nobody"
    why = f"{method.rpartition('/')[2]} is for {roles}, and {party.name} is {_with_article(party.role)}"
    if Role.ADMIN not in allowed:
        return why
    return f"{why}; do it on the coordinator's Mac, or join as an admin (`macpipe token create --role admin`)"


def _with_article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def _find_revocation(trust: Trust, party: Party) -> Refusal | None:
    """Return why a party no longer belongs to the cluster; None if it does."""
    try:
        if not trust.revoked(party.serial):
            return None
    except MacpipeError as e:
        return grpc.StatusCode.UNAVAILABLE, e.sentence, ()
    why = f"{party.name} was removed from this cluster"
    return grpc.StatusCode.UNAUTHENTICATED, why, ((REMOVED_METADATA, "1"),)


class AuthorizationInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in its typing stub alone
    """Authorizes calls of a threaded server. Close it at the end."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._open: dict[grpc.ServicerContext, Party] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._sweep, name="revocations", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        behaviour, method = _behaviour(handler), handler_call_details.method

        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            self._authorize_and_track(method, context)
            return behaviour(request, context)

        return _with_behaviour(handler, guarded)

    def _authorize_and_track(self, method: str, context: grpc.ServicerContext) -> None:
        """Allow the call and register it, so that ``_sweep`` can cancel it when its party is removed."""
        party = authorize(self._trust, method, connection_certificate(context))
        if not isinstance(party, Party):
            status, why, trailing = party
            context.set_trailing_metadata(trailing)
            context.abort(status, why)
        self._open[context] = party
        if not context.add_callback(lambda: self._forget(context)):
            self._forget(context)

    def _forget(self, context: grpc.ServicerContext) -> None:
        self._open.pop(context, None)

    def _sweep(self) -> None:
        while not self._closed.wait(REVOCATION_LOOK_S):
            for context, party in tuple(self._open.items()):
                if _find_revocation(self._trust, party):
                    context.cancel()  # type: ignore[no-untyped-call]


class AioAuthorizationInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its typing stub alone
    """Authorizes calls of an asyncio server."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if not handler:  # the server does not have this method
            return handler
        behaviour, method = _behaviour(handler), handler_call_details.method

        async def unary(request: Any, context: Context) -> Any:
            await self._require_authorized(method, context)
            return await behaviour(request, context)

        async def stream(request: Any, context: Context) -> None:
            party = await self._require_authorized(method, context)
            await self._run_while_admitted(party, context, _run_stream(behaviour, request, context))

        return _with_behaviour(handler, stream if handler.response_streaming else unary)

    async def _require_authorized(self, method: str, context: Context) -> Party:
        """Return the caller: of a passed call the one that the standby asserts, which must be a coordinator itself."""
        shown = connection_certificate(context)
        if is_passed(method) and passed_certificate(context) is not None:
            if refusal := self._find_wrong_standby(shown):
                await _refuse(context, refusal)
            shown = caller_certificate(self._trust, context)
        party = authorize(self._trust, method, shown)
        if not isinstance(party, Party):
            await _refuse(context, party)
        return party

    def _find_wrong_standby(self, shown: AuthContext) -> Refusal | None:
        """Return why a party may not assert another caller; None if it may."""
        standby = self._trust.party(shown)
        if standby is None or not is_coordinator(standby):
            return grpc.StatusCode.PERMISSION_DENIED, "only a coordinator may pass on the calls of others", ()
        if not (refusal := _find_revocation(self._trust, standby)):
            return None
        _, why, removed = refusal
        return grpc.StatusCode.UNAVAILABLE, why, ((PASSER_REMOVED_METADATA, "1"),) if removed else ()

    async def _run_while_admitted(self, party: Party, context: Context, work: Awaitable[None]) -> None:
        """Run one stream. If its party is revoked meanwhile, abort it with the reason."""
        why: list[Refusal] = []
        me = asyncio.current_task()
        assert me

        async def watch() -> None:
            while not (refusal := _find_revocation(self._trust, party)):  # noqa: ASYNC110  # it is read from a file
                await asyncio.sleep(REVOCATION_LOOK_S)
            why.append(refusal)
            me.cancel()

        watching = asyncio.create_task(watch())
        try:
            await work
        except asyncio.CancelledError:
            if not why:
                raise
            me.uncancel()
            await _refuse(context, why[0])
        finally:
            watching.cancel()


async def _refuse(context: Context, refusal: Refusal) -> NoReturn:
    await context.abort(*refusal)


async def _run_stream(behaviour: Callable[..., Any], request: Any, context: Context) -> None:
    """Run a streaming method to its end, whether it is a generator or writes to the context."""
    running = behaviour(request, context)
    if not isinstance(running, AsyncIterator):
        await running
        return
    try:
        async for message in running:
            await context.write(message)
    finally:
        with suppress(AttributeError):
            await running.aclose()  # type: ignore[attr-defined]  # only a generator has it


def _behaviour(handler: Handler) -> Callable[..., Any]:
    found = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    assert found
    return found


def _with_behaviour(handler: Handler, behaviour: Callable[..., Any]) -> Handler:
    """Return the same method with another behaviour."""
    makes: dict[tuple[bool, bool], Callable[..., Handler]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makes[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
