"""Which quantizations of weights exist: modes, bits and group sizes, as MLX has them. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cluster.core.errors import InvalidOption

__all__ = [
    "MODES",
    "RECIPES",
    "Quantization",
    "QuantizationMode",
    "choose_weight_quantization",
    "require_weight_bits",
]


@dataclass(frozen=True, slots=True)
class QuantizationMode:
    """What a mode supports. The first of ``bits`` and of ``group_sizes`` is mlx-lm's default."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]


MODES: Final[Mapping[str, QuantizationMode]] = {
    "affine": QuantizationMode((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": QuantizationMode((4,), (32,)),
    "nvfp4": QuantizationMode((4,), (16,)),
    "mxfp8": QuantizationMode((8,), (32,)),
}
"""Modes of MLX's ``quantize``, by name."""

RECIPES: Final = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
"""mlx-lm's recipes of mixed bits: most matrices get the first number of bits, sensitive ones the second."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are quantized. Numbers of one group share a scale; ``group_size`` counts them."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits ({self.mode}, groups of {self.group_size})"


def choose_weight_quantization(
    mode: str = "affine", bits: int | None = None, group_size: int | None = None
) -> Quantization:
    """Return the quantization with the mode's defaults for what is None. Raise InvalidOption if MLX has no such one."""
    known = MODES.get(mode)
    if known is None:
        raise InvalidOption(f"unknown quantization mode {mode!r}; choose {', '.join(MODES)}", field="q_mode")
    if bits is not None and bits not in known.bits:
        raise InvalidOption(
            f"mode {mode} has no quantization with {bits} bits; choose {_in_words(known.bits)}", field="bits"
        )
    if group_size is not None and group_size not in known.group_sizes:
        raise InvalidOption(
            f"mode {mode} has no groups of {group_size}; choose {_in_words(known.group_sizes)}", field="group_size"
        )
    return Quantization(bits or known.bits[0], group_size or known.group_sizes[0], mode)


def require_weight_bits(bits: int) -> int:
    """Return ``bits`` if weights can be quantized to them while they are loaded, or 0. Raise InvalidOption."""
    if bits and bits not in MODES["affine"].bits:
        raise InvalidOption(f"quantize is {bits}; it must be {_in_words(MODES['affine'].bits)}", field="quantize")
    return bits


def _in_words(choices: tuple[int, ...]) -> str:
    *some, last = map(str, sorted(choices))
    return f"{', '.join(some)} or {last}" if some else last
