# Generated from async_connection.py by ops/clients. Edit that file, then run ops/clients.
"""The blocking client's connection to a coordinator, and the renewal of this machine's certificate over it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cluster.client.calls import (
    Pause,
    Repeater,
    StreamCall,
    Stubs,
    UnaryCall,
    run_blocking,
)
from cluster.client.channel_setup import channel_credentials
from cluster.client.follow_schedule import FollowSchedule, is_elsewhere
from cluster.client.renewal_schedule import ScheduledRenewal
from cluster.core.errors import ConnectionLost, MacpipeError
from cluster.core.limits import CONTROL_TIMEOUT_S
from cluster.security.limits import CLIENT_RENEWAL_LOOK_S, RENEWAL_CLOSE_S
from cluster.security.trust import Trust
from cluster.v1 import cluster_pb2, inference_pb2

if TYPE_CHECKING:
    from cluster.client.calls import StreamMethod, UnaryMethod

Q = TypeVar("Q")
R = TypeVar("R")


class CoordinatorConnection:
    """Starts calls to a coordinator as the party that ``trust`` names, at the first of ``addresses`` until it is left.

    It opens a channel at the first call. In a cluster it renews the certificate in the background. The calls after a
    renewal, by this process or another of this machine, use a new channel; those before it end on the old one.
    """

    def __init__(self, addresses: tuple[str, ...], trust: Trust) -> None:
        self.addresses = addresses
        self.address = addresses[0]
        self._trust = trust
        self._serial = trust.serial
        self._stubs: Stubs | None = None
        self._set_credentials()
        self._renewal = ScheduledRenewal(trust)
        self._repeater = Repeater("certificate renewal", self._renew_certificate, CLIENT_RENEWAL_LOOK_S)
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Stubs] = weakref.WeakSet()
        self._closed = False

    def use_address(self, address: str) -> None:
        """Send the calls from now on to ``address``. Raise as ``Trust.channel`` does."""
        with self._lock:
            if address != self.address:
                self.address = address
                self._set_credentials()

    def leave(self, address: str) -> None:
        """Send the calls from now on to the address after ``address``, unless they go to another one already."""
        if len(self.addresses) > 1 and address == self.address:
            self.use_address(self.addresses[(self.addresses.index(address) + 1) % len(self.addresses)])

    def ask(
        self,
        choose: Callable[[Stubs], UnaryMethod[Q, R]],
        request: Q,
        timeout_s: float | None,
        *,
        repeatable: bool = True,
    ) -> R:
        """Call the method that ``choose`` returns. Raise MacpipeError, also once the connection is closed.

        With several addresses, look for the one that has the leader. Unless the call is ``repeatable``, it is not sent
        again once it may have been carried out.
        """
        schedule = FollowSchedule(len(self.addresses))
        while True:
            with self._lock:
                stubs = self._current_stubs()
                call = UnaryCall(stubs, choose(stubs), request, timeout_s)
            try:
                return call.wait()
            except MacpipeError as error:
                if len(self.addresses) < 2 or (isinstance(error, ConnectionLost) and not repeatable):
                    raise
                pause_s = schedule.pause_s(error, patient=False)
                if pause_s is None:
                    schedule.end(error)
                if is_elsewhere(error):
                    self.leave(call.address)
            Pause().wait(pause_s)

    def find_leader(self) -> None:
        """Send the calls from now on to an address at which the service answers. Raise MacpipeError if none does."""
        self.ask(lambda to: to.inference.ListModels, inference_pb2.ListModelsRequest(), CONTROL_TIMEOUT_S)

    def stream(
        self, choose: Callable[[Stubs], StreamMethod[Q, R]], request: Q, timeout_s: float | None = None
    ) -> StreamCall[R]:
        """Start the streaming method that ``choose`` returns. Raise MacpipeError once the connection is closed."""
        with self._lock:
            stubs = self._current_stubs()
            return StreamCall(stubs, choose(stubs), request, timeout_s)

    def close(self) -> None:
        """Close the connection, after a renewal that has begun. Running calls end with Aborted."""
        try:
            self._repeater.stop(RENEWAL_CLOSE_S)
        finally:
            with self._lock:
                self._closed = True
                self._stubs = None
                still_open = tuple(self._open)
            for stubs in still_open:
                stubs.close()

    def _current_stubs(self) -> Stubs:
        """Return the stubs for this machine's current certificate. The caller holds the lock."""
        if self._closed:
            raise MacpipeError("this client is closed; make a new one")
        serial = self._trust.serial
        if serial != self._serial:
            self._set_credentials()
            self._serial = serial
        if self._stubs is None:
            self._stubs = Stubs(self.address, self._credentials, self._options)
            self._open.add(self._stubs)
            if self._renewal.possible:
                self._repeater.start()
        return self._stubs

    def _set_credentials(self) -> None:
        """Use a new channel from now on. The calls on the one before keep it open."""
        several = len(self.addresses) > 1
        self._credentials, self._options = channel_credentials(self._trust, self.address, others=several)
        self._stubs = None

    def _renew_certificate(self) -> float:
        """Renew the certificate if it is due. Return the seconds until the next look."""
        if self._renewal.due_in_s() <= 0:
            try:
                message = cluster_pb2.RenewCertificateRequest(request=run_blocking(self._renewal.make_request))
                reply = self.ask(lambda to: to.cluster.RenewCertificate, message, CONTROL_TIMEOUT_S)
                run_blocking(self._renewal.install, reply.certificate)
            except MacpipeError as error:
                self._renewal.postpone(error)
        return max(self._renewal.due_in_s(), 1.0)
