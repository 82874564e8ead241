"""The options that place a model on workers. ``serve``, ``load`` and ``plan`` share them."""

# No "from __future__ import annotations": ``takes_options`` moves evaluated annotations to other modules.

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from cluster.core.adapter import parse_adapter
from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_PREFILL_CHUNK
from cluster.core.plan import Objective, Route
from cluster.core.quantization import require_weight_bits
from cluster.core.text import parse_groups, parse_layers

Acceptance = Annotated[
    float,
    typer.Option(metavar="SHARE", help="Plan for one user whose guessed tokens are right this often, from 0 to 1."),
]
Lanes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of batches in the pipeline at once.", show_default="one per stage"),
]
Bits = Annotated[
    int,
    typer.Option(
        metavar="BITS",
        help="Each Mac quantizes its layers to this many bits while it loads them.",
        show_default="as published",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FOLDER", help="Serve an adapter of mlx-lm too, as the model BASE:NAME. Repeatable."),
]


Groups = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORKERS",
        help="Let these workers share each layer, as one stage: ada+bob. Repeatable.",
        show_default="none",
    ),
]
InsecureLinks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORKERS",
        help="Accept that a group of these workers, like ada+bob, exchanges activations that are neither encrypted nor "
        "authenticated. Repeatable.",
    ),
]


class PlanOptions(TypedDict):
    """Keyword arguments of the client's ``load`` and ``plan``."""

    workers: int | None
    layers: str
    route: Route
    lanes: int | None
    kv_bits: int
    quantize: int
    prefill_chunk: int | None
    objective: Objective
    acceptance: float
    adapters: dict[str, str]
    groups: tuple[tuple[str, ...], ...]
    insecure_links: tuple[tuple[str, ...], ...]


def plan_options(
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use this many workers.", show_default="the best number")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help="Layers per stage, like 0-3,4-7. Ranges go to workers by name, or to the best if there are more.",
            show_default="planned",
        ),
    ] = None,
    route: Annotated[
        Route, typer.Option(help="Send activations directly between workers, or relay them through the coordinator.")
    ] = Route.DIRECT,
    lanes: Lanes = None,
    kv_bits: Annotated[
        int,
        typer.Option(
            metavar="BITS",
            help="Quantize KV caches to 8 or 4 bits: longer contexts fit, but a lane takes one request at a time.",
            show_default="not quantized",
        ),
    ] = 0,
    quantize: Bits = 0,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_PREFILL_CHUNK,
            metavar="N",
            help="Read prompts in chunks of N tokens, shorter ones while others decode.",
            show_default="by measured cost and memory",
        ),
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="Optimize for one user's speed, or for many users' total speed.")
    ] = Objective.LATENCY,
    acceptance: Acceptance = 0.0,
    adapter: Adapters = None,
    group: Groups = None,
    insecure_links: InsecureLinks = None,
) -> PlanOptions:
    """Return the options. Raise InvalidOption for layers, bits, adapters or groups that cannot be."""
    if layers:
        parse_layers(layers)
    return {
        "workers": workers,
        "layers": layers or "",
        "route": route,
        "lanes": lanes,
        "kv_bits": check_kv_bits(kv_bits),
        "quantize": require_weight_bits(quantize),
        "prefill_chunk": prefill_chunk,
        "objective": objective,
        "acceptance": acceptance,
        "adapters": parse_adapters(adapter or ()),
        "groups": parse_groups(group or (), "group"),
        "insecure_links": parse_groups(insecure_links or (), "insecure-links"),
    }


def order_options(options: PlanOptions) -> dict[str, Any]:
    """Return the same options as keyword arguments of ``LoadOrder``."""
    layers = parse_layers(options["layers"]) if options["layers"] else None
    rest = {name: value for name, value in options.items() if name not in {"workers", "layers", "adapters"}}
    adapters = tuple(options["adapters"].items())
    return {"worker_count": options["workers"], "layers": layers, "adapters": adapters, **rest}


def parse_adapters(written: Iterable[str]) -> dict[str, str]:
    """Return the folders by name of ``NAME=FOLDER``. A folder of this machine gets its absolute path.

    Raise InvalidOption, also for a name that is given twice.
    """
    adapters: dict[str, str] = {}
    for name, folder in map(parse_adapter, written):
        if name in adapters:
            raise InvalidOption(f"--adapter names {name} twice; give each adapter a name of its own", field="adapter")
        here = Path(folder).expanduser()
        adapters[name] = str(here.absolute()) if here.is_dir() else folder
    return adapters


def check_kv_bits(bits: int) -> int:
    """Return ``bits`` if it is 4, 8, or 0 for no quantization. Raise InvalidOption otherwise."""
    if bits not in (0, 4, 8):
        raise InvalidOption(f"--kv-bits is {bits}; it must be 8 or 4", field="kv_bits")
    return bits
