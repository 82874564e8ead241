"""macpipe: several Macs, one large model. See ops/docs/ARCHITECTURE.md for the map of this package."""

__version__ = "0.1.0"
