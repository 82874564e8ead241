"""Bytes on the data plane. The only room that decodes what a peer's data stream sends."""
