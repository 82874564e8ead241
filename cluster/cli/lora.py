"""``macpipe lora``: trains adapters of a model on the workers of a running coordinator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json

if TYPE_CHECKING:
    from cluster.cli.training_report import TrainingScreen
    from cluster.client.training import Training

Batches = Annotated[int | None, typer.Option(min=-1, metavar="N", help="Batches to evaluate; -1 means all.")]


def lora(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A Hugging Face id, a folder, or faq.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train adapters.")] = False,
    test: Annotated[bool, typer.Option("--test", help="Compute the loss of the test set, in the end.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A folder with train.jsonl, valid.jsonl and test.jsonl, or one such file."),
    ] = None,
    fine_tune_type: Annotated[str | None, typer.Option(metavar="TYPE", help="lora or dora.")] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=-1, metavar="N", help="Layers to train, from the last one; -1 means all.")
    ] = None,
    iters: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps to train.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Sequences in a step.")] = None,
    grad_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps before each update. More of them overlap better.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="RATE")] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help="adam, adamw, muon, sgd or adafactor.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=2, metavar="N", help="Longer sequences are cut.")] = None,
    mask_prompt: Annotated[bool, typer.Option("--mask-prompt", help="Learn answers only, not prompts.")] = False,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Use less memory: compute activations a second time.")
    ] = False,
    val_batches: Batches = None,
    test_batches: Batches = None,
    steps_per_report: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps between reports.")] = None,
    steps_per_eval: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps between validations.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps between two saves.")] = None,
    adapter_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the adapters.", show_default="adapters")
    ] = None,
    resume_adapter_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Begin with the adapters in this safetensors file.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Random seed.")] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="FILE", help="Options in YAML, as for mlx_lm.lora.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use this many workers.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="RANGES", help="Layers per stage, like 0-3,4-7.")] = None,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Train adapters of a model (LoRA) on all workers of a running coordinator.

    Options, data and results are those of mlx_lm.lora. Requests are refused until the training ends.
    """
    from cluster.cli.training_options import TrainingFiles, read_options
    from cluster.cli.training_report import TrainingScreen
    from cluster.client import Client

    given = {name: value for name, value in context.params.items() if value is not None and value is not False}
    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        chosen = read_options(given, config)
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
