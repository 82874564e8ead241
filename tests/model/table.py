"""``ops/docs/MODELS.md``: what was proved of each architecture, a row each, and which cannot be served and why.

The rows are the record of the last full proof; all else is written anew from the installed mlx-lm and the tables of
``architectures``. So a file is stale when writing it anew from its own rows gives another file. It proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

from architectures import Architecture, architectures, not_models, refused
from model.proof import Row

FILE = Path(__file__).parents[2] / "ops" / "docs" / "MODELS.md"
HEAD = """\
# Models

Which modules of mlx-lm a cluster can serve. This file is written by `ops/models`; do not edit it.

To use another version of mlx-lm, change the pin in `pyproject.toml` and `ops/constraints.txt`, run `ops/models`,
and read the diff of this file. `ops/models` stops at a new module that is in no table of
`tests/model/architectures/`, and names it. Add a tiny configuration for it there, or say what it is instead.

Proved with mlx-lm {mlx_lm} and MLX {mlx} on a CPU: {served} of {models} modules are served, {refused} are not.
`./ops/test` proves every third of them again, cut in two. `./ops/test --all` repeats all proofs of all modules and
compares them with this table.

## Served

Each proof uses a tiny model with random weights, cut in 2, in 3 and at every clean cut. A prompt is sent in uneven
chunks and an answer is decoded, over the bytes of real frames. Every log-probability of every token is bit-equal to
that of mlx-lm in one process (float32, CPU). Each stage is loaded from a copy in which every tensor that the stage
must not read is not-a-number.

- **Cuts**: how many of the model's cuts are clean. If layers use results of earlier layers, the cuts between them
  are not clean, and the planner does not use them.
- **Across**: the number of arrays that cross a cut; two numbers if it depends on the cut.
- **Lane**: three sequences of unequal length decode in one batch, and each gets the tokens that it gets alone. If
  mlx-lm's code does not support that, each request has its own lane.
- **Trim**: the caches can drop their last tokens within the context that they were made for.
- **bf16**, **4+8 bit**: the same proof in two stages with bfloat16 weights, and with 4 bits and an override of 8
  bits. MLX's CPU backend multiplies experts only in float32; Metal and CUDA have no such limit.
- **By expert**: the same proof with a checkpoint that has one tensor per expert, as most publishers provide it. If
  mlx-lm expects another layout, this was not tried.

"""
UNPROVED = "**not proved**"
COLUMNS = ("Module", "Family", "Cuts", "Across", "Lane", "Trim", "bf16", "4+8 bit", "By expert")


def line(arch: Architecture, row: Row) -> str:
    """The table's line for one architecture."""
    crossing = " or ".join(map(str, row.crossing))
    cheap = surveyed(arch, row.layers, len(row.cuts), lane=row.lane, trim=row.trim)
    proved = {"Across": crossing, "bf16": row.bfloat16, "4+8 bit": row.mixed, "By expert": row.unstacked}
    return _cells(*({**cheap, **proved}[column] for column in COLUMNS))


def surveyed(arch: Architecture, layers: int, cuts: int, *, lane: bool, trim: bool) -> dict[str, str]:
    """Column -> cell, for the columns that a survey fills."""
    clean = f"all {layers - 1}" if cuts == layers - 1 else f"{cuts} of {layers - 1}"
    caches = {"Lane": "yes" if lane else "no", "Trim": "yes" if trim else "no"}
    return {"Module": arch.name, "Family": arch.family, "Cuts": clean, **caches}


def cells(name: str) -> dict[str, str]:
    """Return column -> cell of a module's row in the file."""
    return dict(zip(COLUMNS, recorded()[name].strip("| ").split(" | "), strict=True))


def not_served() -> set[str]:
    """Modules of which nothing is served; a refused setting of a served one is not among them."""
    return {arch.name for arch in refused().values()}.difference(architectures())


def recorded() -> dict[str, str]:
    """Return module -> row in the file."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {name: text for text in lines if (name := text.removeprefix("| ").partition(" |")[0]) in architectures()}


def text(lines: Mapping[str, str]) -> str:
    """Return the whole file. Raises KeyError that names a module without a row."""
    served = [lines[name] for name in architectures()]
    head = HEAD.format(
        mlx_lm=version("mlx-lm"),
        mlx=version("mlx"),
        served=len(served),
        models=len(served) + len(not_served()),
        refused=len(not_served()),
    )
    parts = [
        head + _table(COLUMNS, served),
        "## Not served\n\n" + _table(("Module", "Why", "Error"), _refusals()),
        "## Other names\n\nCheckpoints of these types use the module of another type.\n\n"
        + _table(("Type", "Module"), _remappings()),
        "## Not models\n\n" + _table(("Module", "Contents"), (_cells(*pair) for pair in not_models().items())),
    ]
    return "\n".join(parts)


def _refusals() -> Iterable[str]:
    for name, arch in refused().items():
        on = "; refused on a CPU" if arch.cpu else ""
        yield _cells(name, arch.why + on, "the engine crashes" if arch.refusal == "crash" else f"`{arch.refusal}`")


def _remappings() -> Iterable[str]:
    for name, module in MODEL_REMAPPING.items():
        yield _cells(name, module)
    for (name, architecture), module in MODEL_ARCHITECTURE_REMAPPING.items():
        yield _cells(f"{name} ({architecture})", module)


def _table(columns: Iterable[str], lines: Iterable[str]) -> str:
    names = tuple(columns)
    return "\n".join([_cells(*names), "|" + "---|" * len(names), *lines]) + "\n"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
