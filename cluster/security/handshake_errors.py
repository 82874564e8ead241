"""What a failed TLS handshake means, by gRPC's words for it, in a sentence that says what to do."""

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
        "it broke the connection off at once: it is just stopping, it is of another cluster or of none, or it does not"
        " take this Mac's certificate any more",
    ),
)


def handshake_failure(said: str) -> str:
    """The meaning of what gRPC said of a connection that did not come to be; empty where no handshake failed."""
    if "failed to connect" not in said:
        return ""
    return next((meaning for words, meaning in _MEANINGS if any(word in said for word in words)), "")
