"""mlx-lm's own model, built from a checkpoint without reading a weight.

The sanitizing of names, the quantization with its per-layer overrides and the architecture itself are all mlx-lm's.
This module knows how to open a model and what can go wrong with that; it knows nothing of cuts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mlx_lm.utils import load_model

from cluster.core.errors import BadCheckpoint, MacpipeError, ModelUnsupported
from cluster.model.module_tree import Module

__all__ = ["open_skeleton"]

LONGEST: Final = 400
"""Characters of mlx-lm's own words that go into a sentence."""


def open_skeleton(path: Path) -> Module:
    """The whole model with every array lazy: nothing is read until an array is evaluated.

    Raises ModelUnsupported (mlx-lm does not know the architecture) or BadCheckpoint (weights or config do not fit it).
    """
    try:
        model: Module = load_model(path, lazy=True, trust_remote_code=False)[0]
    except SystemExit as ended:  # what mlx-lm's olmo does when it has printed which package it misses
        raise ModelUnsupported(
            f"mlx-lm's code for the model in {str(path)!r} needs a package that is not installed"
        ) from ended
    except Exception as error:  # model code raises whatever its config makes it raise; all of it means this folder
        raise _open_error(path, error) from error
    if not hasattr(model, "layers"):
        raise ModelUnsupported(f"{type(model).__module__.rpartition('.')[2]} models have no layers to cut between")
    return model


def _open_error(path: Path, error: Exception) -> MacpipeError:
    what = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError) and what.startswith("Model type "):
        return ModelUnsupported(f"mlx-lm does not know this architecture: {what}")
    if isinstance(error, KeyError) and error.args == ("model_type",):
        return BadCheckpoint("config.json does not say which model_type this is", file="config.json")
    return BadCheckpoint(f"mlx-lm cannot build the model in {str(path)!r}: {type(error).__name__}: {shorten(what)}")


def shorten(text: str) -> str:
    """As much of a library's message as a person will read."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
