"""The options of ``macpipe lora`` that are mlx-lm's, by its names."""

# No "from __future__ import annotations": ``takes_options`` moves evaluated annotations to other modules.

from pathlib import Path
from typing import Annotated, Any

import typer

Batches = Annotated[int | None, typer.Option(min=-1, metavar="N", help="Batches to evaluate; -1 means all.")]


def training_flags(
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A Hugging Face id, a folder, or faq.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train adapters.")] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Compute the loss of the test set, after training if any.")
    ] = False,
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
    micro_batches: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut each batch into so many parts, which overlap.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="RATE", help="Learning rate.")] = None,
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
) -> dict[str, Any]:
    """Return the options that were given, by name."""
    return {name: value for name, value in locals().items() if value is not None and value is not False}
