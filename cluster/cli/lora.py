"""``macpipe lora``: trains adapters of a model on the workers of a running coordinator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.lora_options import training_flags
from cluster.cli.options import Cluster, Coordinator, Json, takes_options

if TYPE_CHECKING:
    from cluster.cli.training_report import TrainingScreen
    from cluster.client.training import Training


@takes_options(training_flags)
def lora(
    options: Any = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="FILE", help="Options in YAML, as for mlx_lm.lora.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use this many workers.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="RANGES", help="Layers per stage, like 0-3,4-7.")] = None,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Train adapters of a model on its workers.

    Options, data and results are those of mlx_lm.lora. Requests are refused until the training ends.
    """
    from cluster.cli.training_options import TrainingFiles, read_options
    from cluster.cli.training_report import TrainingScreen
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        chosen = read_options(options, config)
        files = TrainingFiles.of(chosen)
        screen = TrainingScreen(sys.stderr, chosen.options.iters, json=json)
        _follow(client.train(chosen.model, chosen.options, files.sent, workers=workers, layers=layers), files, screen)


def _follow(training: Training, files: Any, screen: TrainingScreen) -> None:
    """Show the events of a training, and store its adapters, until it ends."""
    from cluster.core.training_events import AdapterFile

    try:
        for event in training:
            if isinstance(event, AdapterFile):
                screen.saved(files.store(event))
            else:
                screen.show(event)
    finally:
        screen.close()
