"""Tell another coordinator who leads, and ask it the same."""

from __future__ import annotations

import grpc

from cluster.codec.leadership import decode_claim, encode_leads_request
from cluster.core.errors import DeadlineExceeded, Unreachable
from cluster.core.leadership import LeaderClaim
from cluster.core.limits import GONE_S
from cluster.core.term_limits import MAX_TERM
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.other_coordinators import AskCoordinator
from cluster.transport.grpc_setup import control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1.leader_pb2_grpc import LeaderServiceStub

__all__ = ["ask_over"]


def ask_over(trust: Trust) -> AskCoordinator:
    """Return a function that calls a coordinator with these credentials; it raises ``MacpipeError``."""

    async def ask(address: str, claim: LeaderClaim) -> LeaderClaim:
        channel = control_channel(trust, address, COORDINATOR)
        try:
            answer = await LeaderServiceStub(channel).Leads(encode_leads_request(claim), timeout=GONE_S)
        except grpc.aio.AioRpcError as e:
            error = from_rpc_error(e, address, peer="other coordinator")
            raise Unreachable(error.sentence) if isinstance(error, DeadlineExceeded) else error from e
        finally:
            await channel.close(None)
        if answer.term > MAX_TERM:
            raise Unreachable(f"the coordinator at {address} names a term that cannot be")
        return decode_claim(answer)

    return ask
