"""Builds mlx-lm's own model from a checkpoint, without reading weights.

mlx-lm sanitizes the names, applies the quantization with its per-layer overrides, and implements the architecture.
This module knows how to open a model and which errors can occur; it knows nothing of cuts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mlx_lm.utils import load_model

from cluster.core.errors import BadCheckpoint, MacpipeError, ModelUnsupported
from cluster.model.module_tree import Module

__all__ = ["open_model", "open_skeleton"]

LONGEST: Final = 400
"""Characters of an mlx-lm message that go into an error sentence."""


def open_skeleton(path: Path) -> Module:
    """Return the whole model with lazy arrays: nothing is read until an array is evaluated.

    Raises ModelUnsupported (mlx-lm does not know the architecture) or BadCheckpoint (weights or config do not fit it).
    """
    model, _ = open_model(path)
    if not hasattr(model, "layers"):
        raise ModelUnsupported(
            f"{type(model).__module__.rpartition('.')[2]} models have no list of layers to split; choose another model"
        )
    return model


def open_model(path: Path) -> tuple[Module, dict[str, Any]]:
    """Return the whole model with lazy arrays, and its config as mlx-lm understands it. Raises as ``open_skeleton``."""
    try:
        opened: tuple[Module, dict[str, Any]] = load_model(path, lazy=True, trust_remote_code=False)
    except SystemExit as ended:  # mlx-lm's olmo exits if a package is missing, after printing its name
        raise ModelUnsupported(
            f"mlx-lm's code for the model in {str(path)!r} needs a package that is not installed; install it"
        ) from ended
    except Exception as error:  # model code may raise anything for an invalid config
        raise _open_error(path, error) from error
    return opened


def _open_error(path: Path, error: Exception) -> MacpipeError:
    what = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError) and what.startswith("Model type "):
        return ModelUnsupported(f"mlx-lm does not know this architecture: {what}")
    if isinstance(error, KeyError) and error.args == ("model_type",):
        return BadCheckpoint("config.json has no model_type; copy or fetch the model again", file="config.json")
    return BadCheckpoint(f"mlx-lm cannot build the model in {str(path)!r}: {type(error).__name__}: {shorten(what)}")


def shorten(text: str) -> str:
    """Return the beginning of a library's message, at most ``LONGEST`` characters."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
