"""``macpipe status``: shows the workers and the layers that each holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.leadership_lines import describe_leadership
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.cluster_state import ServingState, count_stages, exposure_in_words, holders_in_words
from cluster.core.limits import FAR_OFF
from cluster.core.plan import Link, Spare, Speculation
from cluster.core.text import (
    count_in_words,
    figure_in_words,
    gib_in_words,
    is_loopback,
    link_in_words,
    parse_address,
    with_subject,
)
from cluster.security.limits import CLOCKS_DIFFER_S

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from cluster.cli.keyboard import Key
    from cluster.client import ClusterState, Repair, StageState, WorkerState
    from cluster.core.cluster_state import DeploymentState

RIGHT: Final = frozenset({"weights", "memory used", "predicted", "measured", "step (plan)"})
MODELS_RIGHT: Final = frozenset({"context", "requests", "idle"})
NO_WORKERS: Final = "no workers; start one with `macpipe worker`"
WIDE_COLUMNS: Final = 100
"""On narrower screens the machines are listed below the table, and a step's two times share a column."""


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until q or Ctrl-C.")] = False,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Show workers, the model and its layers.

    With --json, layers are [start, end): [0, 27] means layers 0-26. With --watch and --json, one object is printed
    every second.
    """
    from cluster.client import Client

    if watch and (json or sys.stdout.isatty()):
        from cluster.cli.watch import print_states, watch_cluster

        with errors_in_json(json):
            if json:
                print_states(coordinator, cluster)
            else:
                watch_cluster(coordinator, cluster, StatusView())
        return
    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        state = client.cluster()
        if json:
            from cluster.cli.json_output import print_json

            print_json(state)
        else:
            show_state(state)


def show_state(state: ClusterState) -> None:
    """Print the cluster's state on stdout."""
    from cluster.cli.screen import console, print_lines

    screen = console(sys.stdout)
    for part in describe_state(state, screen.width):
        if isinstance(part, str):
            print_lines(screen, part)
        else:
            screen.print(part)


def describe_state(state: ClusterState, width: int) -> list[str | Table]:
    """Return the lines and the table that describe a cluster on a screen of ``width`` columns."""
    wide = width >= WIDE_COLUMNS
    parts: list[str | Table] = list(headline(state))
    if state.deployments:
        parts += ["", _models(state), ""]
    if not state.workers:
        return [*parts, NO_WORKERS]
    parts += [*([] if state.deployments else [""]), _workers(state, wide=wide), ""]
    if not wide:
        parts += [f"{worker.name}: {machine}" for worker in state.workers if (machine := _machine(worker))]
    parts += [line for _, ring in state.rings for line in describe_links(ring.stages)]
    parts += [f"spare: {spare.worker}: {spare.why}" for spare in idle_spares(state)]
    if powers := [worker for worker in state.workers if worker.power_watts]:
        parts.append(f"power: {', '.join(f'{worker.name} {worker.power_watts:.0f} W' for worker in powers)}")
    for worker in state.workers:
        held = held_stages(state, worker.name)
        parts += [*_describe_disk(worker), *_describe_problems(worker, held)]
    return parts


def idle_spares(state: ClusterState) -> list[Spare]:
    """Return the workers that hold nothing of any model."""
    busy = {state.draft_worker, *(stage.worker for stage in state.all_stages)}
    return [spare for spare in state.spares if spare.worker not in busy]


def held_stages(state: ClusterState, worker: str) -> list[StageState]:
    """Return the stages of one model that a worker holds; nothing if it holds several models, whose times mix."""
    rings = [[stage for stage in ring.stages if stage.worker == worker] for _, ring in state.rings]
    holding = [held for held in rings if held]
    return holding[0] if len(holding) == 1 else []


def _models(state: ClusterState) -> Table:
    """Return the table of all models, loaded or not."""
    from cluster.cli.screen import format_duration, printable, table

    shown = table("model", "state", "context", "requests", "idle", "layers", right=MODELS_RIGHT)
    for one in state.deployments:
        held = "; ".join(holders_in_words(replica.stages) for replica in one.replicas)
        shown.add_row(
            printable(one.name) + (" (pinned)" if one.pinned else ""),
            "not loaded" if one.state is ServingState.IDLE else one.state,
            str(one.max_context) if one.max_context else "-",
            str(len(one.requests)) if one.replicas else "-",
            format_duration(one.idle_seconds) if one.idle_seconds else "-",
            printable(held or one.activity or "-"),
        )
    return shown


class StatusView:
    """What ``status --watch`` shows of each snapshot."""

    def add(self, state: ClusterState) -> None:
        """Show this snapshot from now on."""
        self._state = state

    def press(self, key: Key) -> None:
        """No key but q has an effect."""

    def draw(self, width: int, height: int, lost: str) -> RenderableType:
        """Return the screen; ``lost`` says why the snapshot is old, "" if it is not."""
        from rich.console import Group
        from rich.text import Text

        from cluster.cli.screen import printable

        parts = [Text(printable(one)) if isinstance(one, str) else one for one in describe_state(self._state, width)]
        return Group(*([Text(printable(lost), "bold red")] if lost else []), *parts)


def describe_links(stages: Sequence[StageState]) -> list[str]:
    """Return a line for each measured link between two stages."""
    senders = {stage.index: stage.worker for stage in stages if stage.rank == 0}
    return [
        f"link: {senders[stage.index - 1]} to {stage.worker}"
        + link_in_words(Link(stage.link_round_trip_ms / 1e3, stage.link_bandwidth, stage.link_interface))
        for stage in stages
        if stage.link_bandwidth and stage.index - 1 in senders
    ]


def _describe_problems(worker: WorkerState, held: list[StageState]) -> list[str]:
    """Return a line for each problem of a worker, which holds the stages ``held``."""
    from cluster.cli.screen import format_duration

    lines = []
    if worker.memory_pressure in ("warning", "critical"):
        lines.append(
            f"{worker.name}: macOS reports memory pressure ({worker.memory_pressure}); end other programs on it"
        )
    if worker.lag_seconds:
        lines.append(describe_overload(worker.name, worker.lag_seconds))
    if abs(worker.clock_ahead_seconds) > CLOCKS_DIFFER_S:
        direction = "ahead" if worker.clock_ahead_seconds > 0 else "behind"
        lines.append(f"{worker.name}'s clock is {format_duration(abs(worker.clock_ahead_seconds))} {direction}")
    if off := describe_deviation(worker.name, held):
        lines.append(off)
    if worker.problem:
        lines.append(with_subject(worker.name, worker.problem))
    return lines


def describe_overload(worker: str, lag_s: float) -> str:
    """Return a warning that a worker's machine is overloaded, with the remedy."""
    return (
        f"{worker}: the machine is overloaded and responds up to {lag_s:.1f} s late: end other programs on it, or"
        f" move its layers elsewhere with `macpipe drain {worker}`"
    )


def describe_deviation(worker: str, held: list[StageState]) -> str:
    """Return a warning that a worker's step time differs from the prediction, with the remedy, or an empty string."""
    predicted, measured = _step_ms(held)
    if not (predicted and measured) or 1 / FAR_OFF <= measured / predicted <= FAR_OFF:
        return ""
    if measured < predicted:
        compared, cause = "faster than", "the Mac was busy when its speed was measured"
    else:
        compared, cause = "slower than", "the Mac is busy now, or its profile is wrong"
    return (
        f"{worker}: a step takes {figure_in_words(measured)} ms, {compared} the predicted {figure_in_words(predicted)}"
        f" ms: {cause}; measure again there with `macpipe worker --profile new`"
    )


def _describe_disk(worker: WorkerState) -> list[str]:
    from cluster.cli.screen import format_share

    if not worker.prefix_disk_limit:
        return []
    share = format_share(worker.prefix_disk_bytes, worker.prefix_disk_limit)
    return [f"{worker.name}: {share} of prefixes on disk, {worker.prefix_disk_evictions} evicted"]


def _describe_exposure(state: ClusterState) -> list[str]:
    """Describe the groups whose links leave this machine: nothing protects these."""
    hosts = {worker.name: parse_address(worker.data_address)[0] for worker in state.workers if worker.data_address}
    ranks = sorted({stage.worker for _, ring in state.rings for stage in ring.stages if stage.ranks > 1})
    exposed = any(name in hosts and not is_loopback(hosts[name]) for name in ranks)
    return [exposure_in_words(ranks)] if exposed else []


def headline(state: ClusterState) -> list[str]:
    """Return the first lines: the state in a sentence, then problems and counts."""
    from cluster.cli.screen import format_duration

    up = format_duration(state.uptime_seconds)
    lines = [f"cluster {state.cluster}: {state.state}{describe_models(state)}, up {up}"]
    if state.problem and not state.repair:  # else the line about the recovery says it
        lines.append(f"problem: {state.problem}")
    if state.activity:
        lines.append(state.activity)
    lines += describe_leadership(state.leadership)
    lines += [f"warning: {warning}" for warning in (*state.warnings, *_describe_exposure(state))]
    if state.lag_seconds:
        lines.append(
            "problem: the coordinator's machine is overloaded and responds up to"
            f" {state.lag_seconds:.1f} s late: end other programs on it"
        )
    if state.repair:
        lines.append(describe_repair(state.repair))
    if state.move:
        lines.append(describe_move(state.move))
    if state.model and (not state.deployments or state.training):
        room = f"up to {count_in_words(state.max_sequences, 'answer')} of {state.max_context} tokens at once"
        lines.append(
            f"{count_in_words(state.layers, 'layer')} in {count_stages(state.stages)} ({state.route})"
            + ("" if state.training else f"; {room}")
        )
    if state.deployments:
        lines += [f"{one.name}: {line}" for one in state.deployments for line in _describe_extras(state, one)]
    else:
        lines += _describe_extras(state, state)
    lines.append(
        f"{count_in_words(len(state.all_requests), 'live request')}, {state.requests_finished} finished,"
        f" {count_in_words(state.tokens_generated, 'token')} generated"
    )
    if state.disk_hits or state.disk_misses:
        lines.append(
            f"prefixes read from disk: {state.disk_hits} ({count_in_words(state.disk_tokens, 'token')});"
            f" not found there: {state.disk_misses}"
        )
    return lines


def describe_models(state: ClusterState) -> str:
    """Return the served model behind a space, or how many of several are loaded; "" without a model."""
    if not state.deployments or state.training:
        return f" {state.model}" if state.model else ""
    loaded = sum(bool(one.replicas) for one in state.deployments)
    return f" {loaded} of {count_in_words(len(state.deployments), 'model')}"


def _describe_extras(state: ClusterState, model: ClusterState | DeploymentState) -> list[str]:
    """Describe a model's adapters, and what guesses its tokens; how well is only known of the default model."""
    lines = []
    if model.adapters:
        lines.append(f"adapters: {', '.join(adapter.name for adapter in model.adapters)}")
    if model.speculation is not Speculation.OFF:
        draft = f", draft model on {model.draft_worker}" if model.draft_worker else ""
        is_default = model is state or model is state.deployments[0]
        guesses = f": {describe_guesses(state)}" if is_default else ""
        lines.append(f"speculation ({model.speculation}{draft}){guesses}")
    return lines


def describe_guesses(state: ClusterState) -> str:
    """Describe for each source how many of its guesses were right, how far ahead they go now, and what they bring."""
    shown = [
        f"{one.source} {one.accepted} of {one.guessed} guesses right ({one.accepted / one.guessed:.0%})"
        + (f", {one.rows} in rows" if one.rows else "")
        for one in state.guesses
        if one.guessed
    ]
    parts = [", ".join(shown) or "no guesses yet"]
    if (window := max((request.window for request in state.requests), default=1)) > 1:
        parts.append(f"up to {window} frames of a request in flight")
    if (gain := max((request.tokens_per_pass for request in state.requests), default=1.0)) > 1:
        parts.append(f"up to {gain:.1f} tokens for each pass through the stages")
    if state.guesses_without_room:
        parts.append(f"no memory for the marks of guesses {state.guesses_without_room} times")
    return "; ".join(parts)


def describe_move(move: Repair) -> str:
    """Describe a planned move of layers: cause, step, elapsed and expected time."""
    return f"{move.cause}: {move.doing} for {move.since_seconds:.1f} s{_describe_expected(move)}"


def _describe_expected(repair: Repair) -> str:
    return f", {repair.expected_seconds:.0f} s expected" if repair.expected_seconds else ""


def describe_repair(repair: Repair) -> str:
    """Describe a recovery: cause, step, elapsed and expected time, and which attempt it is after the first."""
    again = f", attempt {repair.attempts}" if repair.attempts > 1 else ""
    how_long = f"for {repair.since_seconds:.1f} s{_describe_expected(repair)}{again}"
    return f"recovering: {repair.cause}; {repair.doing} ({how_long})"


def _describe_standing(worker: WorkerState) -> str:
    from cluster.cli.screen import format_duration

    if worker.standing in ("suspect", "gone"):
        return f"{worker.standing} {format_duration(worker.silent_seconds)}"
    if not worker.reachable:
        return "unreachable"
    return "drained" if worker.draining else "reachable"


def _machine(worker: WorkerState) -> str:
    chip = worker.chip or worker.backend
    return f"{chip}, macOS {worker.macos_version}" if worker.macos_version else chip


def _workers(state: ClusterState, *, wide: bool) -> Table:
    from cluster.cli.screen import format_share, printable, table

    machine, times = (("machine",), ("predicted", "measured")) if wide else ((), ("step (plan)",))
    shown = table("worker", *machine, "layers", "weights", "memory used", *times, "state", right=RIGHT)
    for worker in state.workers:
        named = [(name, one) for name, ring in state.rings for one in ring.stages if one.worker == worker.name]
        held = [stage for _, stage in named]
        without_layers = "draft model" if worker.name == state.draft_worker else "-"
        shown.add_row(
            printable(worker.name),
            *((printable(_machine(worker)),) if wide else ()),
            printable(", ".join(f"{name} {stage.share}".strip() for name, stage in named)) or without_layers,
            gib_in_words(sum(stage.weight_bytes for stage in held)) if held else "-",
            format_share(worker.memory_used, worker.memory_limit) if worker.reachable else "-",
            *_decode_ms(held_stages(state, worker.name), wide=wide),
            _describe_standing(worker),
        )
    return shown


def _decode_ms(held: list[StageState], *, wide: bool) -> tuple[str, ...]:
    """Format a decode step's predicted and measured time, or both in one cell; dashes where they are unknown."""
    predicted, measured = (figure_in_words(ms) if ms else "-" for ms in _step_ms(held))
    if wide:
        return tuple(f"{ms} ms" if ms != "-" else ms for ms in (predicted, measured))
    return ("-" if predicted == measured == "-" else f"{measured} ({predicted}) ms",)


def _step_ms(held: list[StageState]) -> tuple[float, float]:
    """Return a decode step's predicted and measured ms; 0 if unknown.

    Once frames are measured, the prediction is for those same frames.
    """
    measured = sum(stage.measured_ms for stage in held)
    return sum((stage.expected_ms if measured else 0) or stage.predicted_ms for stage in held), measured
