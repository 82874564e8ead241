"""Every text model of the pinned mlx-lm as a tiny configuration: the tables in ``tests/model/architectures/``.

A family is a file there. Its ``[base]`` is laid over that of ``common.toml``, and each module's own table over both, so
a table has only what is specific to its module. The module knows configurations; ``checkpoints`` creates weights.
"""

from __future__ import annotations

import pkgutil
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx_lm.models

from checkpoints import EXPERTS

FOLDER = Path(__file__).parent / "model" / "architectures"
FAMILIES = ("dense", "experts", "latent", "recurrent", "wrapped")
"""In the order in which people read of them; a wrapped model may name one of an earlier family as its text half."""
WIDTHS = {
    *("intermediate_size", "moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"),
    *("dense_intermediate_size", "share_expert_dim", "ffn_hidden_size", "expert_ffn_hidden_size"),
}
HEADS = {
    *("num_attention_heads", "num_key_value_heads", "num_attention_groups", "index_n_heads", "o_groups", "num_heads"),
    *("linear_num_key_heads", "linear_num_value_heads"),
}


@dataclass(frozen=True)
class Architecture:
    """``name`` is mlx-lm's module; ``config`` what its config.json would say.

    ``stacks`` says how the makers' checkpoints name what mlx-lm stacks: its name for a stack -> theirs, with ``{i}``
    for the part's number. Where the model cannot be served, ``refusal`` is in the words of the error, ``why`` is for
    people, and ``cpu`` says that it is the CPU's fault.
    """

    name: str
    family: str
    config: dict[str, Any]
    stacks: dict[str, str] = field(default_factory=lambda: EXPERTS)
    refusal: str = ""
    why: str = ""
    cpu: bool = False


@cache
def architectures() -> dict[str, Architecture]:
    """Every one that a stage can run, by its module's name."""
    found: dict[str, Architecture] = {}
    for family in FAMILIES:
        table = _table(family)
        base = {**_table("common")["base"], **table.pop("base", {})}
        for name, own in table.items():
            found[name] = _architecture(name, family, base, own, found)
    return found


@cache
def refused() -> dict[str, Architecture]:
    """Those that cannot be cut or run here, with the reason; some are a setting of a module that else can be."""
    base = _table("common")["base"]
    return {name: _architecture(own.pop("module"), "refused", base, own, {}) for name, own in _table("refused").items()}


@cache
def not_models() -> dict[str, str]:
    """Return the modules of ``mlx_lm.models`` that are not text models, each with what it is instead."""
    reasons: dict[str, str] = _table("not_models")
    return reasons


def modules() -> list[str]:
    """Return the names of all modules of the installed ``mlx_lm.models``, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))


def divisible(config: Any, size: int) -> Any:
    """Return the configuration with heads and widths that ``size`` ranks can share, also if quantized by 32."""
    if not isinstance(config, dict):
        return config
    changed = {key: divisible(value, size) for key, value in config.items()}
    changed |= dict.fromkeys(changed.keys() & WIDTHS, 32 * size)
    return changed | {key: config[key] * size // 2 for key in changed.keys() & HEADS if size > 2}


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def _architecture(
    name: str, family: str, base: dict[str, Any], own: dict[str, Any], known: dict[str, Architecture]
) -> Architecture:
    inner = known[own["text"]].config if "text" in own else {"model_type": name}
    config = {**base, "model_type": name, **own}
    facts = {key: config.pop(key) for key in ("stacks", "refusal", "why", "cpu") if key in config}
    if config.pop("text", None) or "text_config" in own:
        config["text_config"] = {**base, **inner, **own.get("text_config", {})}
    return Architecture(name, family, config, **facts)
