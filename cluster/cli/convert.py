"""``macpipe convert SOURCE FOLDER``: writes a model in another precision, without holding it in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Home, Json
from cluster.core.errors import InvalidOption
from cluster.core.quantization import MODES, RECIPES, choose_weight_quantization
from cluster.platform.paths import state_home

if TYPE_CHECKING:
    from cluster.conversion.converter import Converted
    from cluster.core.quantization import Quantization
    from cluster.model.weight_conversion import Conversion

GGUF_MAGIC: Final = b"GGUF"
"""The first bytes of a GGUF file."""


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A Hugging Face id, a model folder, or a GGUF file.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new model's folder, which must not exist.")],
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantize, with the mode's defaults.")] = False,
    bits: Annotated[
        int | None, typer.Option("--bits", "--q-bits", metavar="N", help="Bits per weight.", show_default="the mode's")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", "--q-group-size", metavar="N", help="Weights that share a scale.", show_default="the mode's"
        ),
    ] = None,
    q_mode: Annotated[
        str | None, typer.Option(metavar="MODE", help=f"{', '.join(MODES)}.", show_default="affine")
    ] = None,
    quant_predicate: Annotated[
        str | None, typer.Option(metavar="RECIPE", help=f"Mixed bits: {', '.join(RECIPES)}.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Weights that are not quantized: float16, bfloat16 or float32."),
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", "-d", help="Undo a quantization.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Convert a model: quantize it, dequantize it, or change its type.

    Works on one tensor at a time, so a model may be larger than this Mac's memory. An interrupted conversion continues
    where it stopped when it is started again. The tensors are those of mlx_lm.convert.
    """
    from cluster.cli.screen import note

    with errors_in_json(json):
        wanted = None
        if quantize or any(given is not None for given in (bits, group_size, q_mode, quant_predicate)):
            wanted = choose_weight_quantization(q_mode or "affine", bits, group_size)
        try:
            converted = convert_model(source, folder, wanted, quant_predicate or "", dtype or "", dequantize, home)
        except KeyboardInterrupt:
            note("stopped; the same command continues from here")
            raise
        show_converted(converted, json)


def show_converted(converted: Converted, json: bool) -> None:
    """Print where the new model is, its size and its bits per weight."""
    from cluster.cli.json_output import print_json
    from cluster.cli.screen import format_bytes

    if json:
        print_json(converted)
        return
    size = format_bytes(converted.bytes)
    sys.stdout.write(f"{converted.folder}: {size}, {converted.bits_per_weight:.3g} bits per weight\n")


def convert_model(
    source: str,
    folder: Path,
    quantization: Quantization | None,
    recipe: str,
    dtype: str,
    dequantize: bool,
    home: Path | None,
) -> Converted:
    """Find SOURCE, and convert it with progress on stderr."""
    from cluster.conversion.work_folder import refuse_existing
    from cluster.model.device import choose
    from cluster.model.weight_conversion import Conversion

    conversion = Conversion(quantization, recipe, dtype, dequantize)
    target = folder.expanduser().absolute()
    refuse_existing(target)
    choose()
    if (file := Path(source).expanduser()).is_file():
        return _convert_file(file, target, conversion)
    return convert_folder(source, target, conversion, state_home(home))


def convert_folder(source: str, target: Path, conversion: Conversion, home: Path) -> Converted:
    """Convert a folder or a model of the hub, which is fetched first."""
    from cluster.cli.convert_progress import ConversionBar
    from cluster.cli.pull import fetch
    from cluster.conversion.converter import convert_checkpoint
    from cluster.store.store import Store

    found = Store(home).find_by_name(source)
    if target.is_relative_to(found.folder):
        raise InvalidOption(f"{target} is inside the source's folder; give another one", field="folder")
    if found.partial:
        fetch(source, found, None, home)
    with ConversionBar(sys.stderr, source) as bar:
        return convert_checkpoint(found.folder, target, conversion, bar.show)


def _convert_file(file: Path, target: Path, conversion: Conversion) -> Converted:
    """Convert a GGUF file."""
    with file.open("rb") as opened:
        if opened.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise InvalidOption(f"{file} is a file, but not a GGUF file; give the model's folder", field="source")
    from cluster.cli.convert_progress import ConversionBar
    from cluster.conversion.gguf_source import convert_gguf

    with ConversionBar(sys.stderr, file.name) as bar:
        return convert_gguf(file.absolute(), target, conversion, bar.show)
