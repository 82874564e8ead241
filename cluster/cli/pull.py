"""``macpipe pull MODEL``: downloads a model or some of its layers from the Hugging Face hub, ahead of serving."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Home, Json
from cluster.core.errors import InvalidOption, ModelNotFound
from cluster.core.plan import LayerRange
from cluster.core.text import parse_range
from cluster.platform.paths import state_home

if TYPE_CHECKING:
    from threading import Event

    from cluster.store.store import FoundModel
    from cluster.store.tensor_fetch import Fetch, Fetched


@dataclass(frozen=True, slots=True)
class Pulled:
    """The result of a pull. ``bytes`` is the size of the requested tensors, ``fetched_bytes`` what was downloaded."""

    model: str
    folder: str
    fingerprint: str
    revision: str
    layers: LayerRange | None
    tensors: int
    bytes: int
    fetched_bytes: int


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face id: OWNER/NAME[@REVISION].")],
    layers: Annotated[
        str | None,
        typer.Option(metavar="A-B", help="Only the tensors that a stage with these layers reads.", show_default="all"),
    ] = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Download MODEL, or some of its layers.

    Downloads only missing byte ranges, and verifies them. This Mac's worker uses them. An interrupted download
    continues where it stopped. With --json, layers are [start, end): [0, 27] means layers 0-26.
    """
    from cluster.cli.json_output import print_json
    from cluster.cli.screen import format_bytes
    from cluster.store.store import Store

    with errors_in_json(json):
        wanted = parse_range(layers) if layers else None
        folder = state_home(home)
        try:
            found = Store(folder).find_by_name(model)
        except ModelNotFound:
            if "/" in model:
                raise
            raise InvalidOption(f"{model!r} is not a Hugging Face id; give OWNER/NAME", field="model") from None
        pulled = fetch(model, found, wanted, folder)
        if json:
            print_json(pulled)
        else:
            part = f"layers {wanted} of {model}" if wanted else model
            sys.stdout.write(f"{part}: {format_bytes(pulled.bytes)} in {pulled.folder}\n")


def fetch(model: str, found: FoundModel, layers: LayerRange | None, home: Path) -> Pulled:
    """Download what is missing, with progress on stderr."""
    from threading import Event

    from cluster.model.checkpoint import open_checkpoint
    from cluster.store.digest_manifest import DigestManifest
    from cluster.store.hub import Hub
    from cluster.store.tensor_fetch import Fetch, Wanted

    checkpoint = open_checkpoint(found.folder)
    names = _tensors_of_layers(found.folder, model, layers) if layers else tuple(checkpoint.tensors)
    fetched_bytes = 0
    commit = ""
    if found.partial:
        origin = found.partial.origin
        commit = origin.commit
        stop = Event()
        hub = Hub(origin.repo, commit) if origin.repo else None
        manifest = DigestManifest(home, checkpoint.fingerprint)
        job = Fetch(found.partial, manifest, Wanted(names), hub=hub, stop=stop, what=model)
        fetched_bytes = _run_with_progress(job, stop, model).hub
    size = sum(checkpoint.tensors[name].nbytes for name in names)
    return Pulled(model, str(found.folder), checkpoint.fingerprint, commit, layers, len(names), size, fetched_bytes)


def _tensors_of_layers(folder: Path, model: str, layers: LayerRange) -> tuple[str, ...]:
    from cluster.model.model_shape import read_shape
    from cluster.model.tensor_map import tensor_map

    shape = read_shape(folder, model, None)
    if layers.end > shape.layers:
        raise InvalidOption(f"--layers {layers}: {model} has layers 0-{shape.layers - 1}", field="layers")
    return tuple(sorted(tensor_map(folder, shape.shared).of(layers)))


def _run_with_progress(job: Fetch, stop: Event, model: str) -> Fetched:
    """Run the download on a thread and show its progress. Ctrl-C stops it between two pieces."""
    from concurrent.futures import ThreadPoolExecutor, wait

    from cluster.cli.load_progress import PullBar
    from cluster.core.limits import FETCH_TICK_S

    bar = PullBar(sys.stderr, model)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job.run)
        try:
            while wait([running], timeout=FETCH_TICK_S).not_done:
                bar.show(job.progress)
            running.result()
            bar.show(job.progress)
        finally:
            stop.set()
            bar.close()
    return job.progress
