"""``macpipe fuse``: writes a model with an adapter fused into its weights, without holding it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Home, Json


def fuse(
    model: Annotated[str, typer.Option(metavar="MODEL", help="A Hugging Face id or a model folder.")],
    adapter_path: Annotated[Path, typer.Option(metavar="FOLDER", help="The adapter's folder.")] = Path("adapters"),
    save_path: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The fused model's folder, which must not exist.")
    ] = Path("fused_model"),
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Undo the model's quantization.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Fuse an adapter of mlx-lm into its model.

    Works on one tensor at a time. An interrupted run continues where it stopped when it is started again. The tensors
    are those of mlx_lm.fuse.
    """
    from cluster.cli.convert import convert_folder, show_converted
    from cluster.conversion.work_folder import refuse_existing
    from cluster.core.adapter import AdapterRef
    from cluster.model.adapter_files import open_adapter
    from cluster.model.device import choose
    from cluster.model.weight_conversion import Conversion
    from cluster.platform.paths import state_home

    with errors_in_json(json):
        target, folder = save_path.expanduser().absolute(), adapter_path.expanduser().absolute()
        refuse_existing(target)
        adapter = AdapterRef(folder.name, str(folder), open_adapter(folder).fingerprint)
        choose()
        fused = convert_folder(model, target, Conversion(dequantize=dequantize, adapter=adapter), state_home(home))
        show_converted(fused, json)
