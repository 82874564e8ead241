"""Explain a failed TLS handshake by gRPC's error text, and say what to do."""

from __future__ import annotations

from typing import Final

_MEANINGS: Final = (
    (("WRONG_VERSION_NUMBER",), "it does not speak TLS, so it is in no cluster; let it join with `macpipe join TOKEN`"),
    (
        ("certificate has expired", "certificate is not yet valid"),
        "its certificate is not valid now by this Mac's clock; compare the clocks of both Macs",
    ),
    (
        ("BAD_SIGNATURE", "CERTIFICATE_VERIFY_FAILED", "certificate signature failure", "unable to get local issuer"),
        "its certificate is of another cluster; let it join this one with `macpipe join TOKEN`",
    ),
    (
        ("Socket closed", "Connection reset", "handshake"),
        "it closed the connection at once: it is stopping, it is in another cluster or in none, or it no longer"
        " accepts this Mac's certificate",
    ),
)


def handshake_failure(grpc_message: str) -> str:
    """Return the cause of a failed connection by gRPC's message; empty if no handshake failed."""
    if "failed to connect" not in grpc_message:
        return ""
    return next((meaning for words, meaning in _MEANINGS if any(word in grpc_message for word in words)), "")
