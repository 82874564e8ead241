"""``macpipe status``: shows the workers and the layers that each holds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.limits import FAR_OFF
from cluster.core.plan import Speculation
from cluster.security.limits import CLOCKS_DIFFER_S

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.client import ClusterState, Repair, StageState, WorkerState

RIGHT: Final = frozenset({"weights", "memory used", "predicted", "measured"})


def status(coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False) -> None:
    """Show workers, the model and its layers.

    With --json, layers are [start, end): [0, 27] means layers 0-26.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        state = client.cluster()
        if json:
            from cluster.cli.json_output import print_json

            print_json(state)
        else:
            show_state(state)


def show_state(state: ClusterState) -> None:
    """Print the cluster's state on stdout."""
    from cluster.cli.screen import console, printable

    screen = console(sys.stdout)
    for line in headline(state):
        screen.print(printable(line), soft_wrap=True)
    if not state.workers:
        screen.print("no workers; start one with `macpipe worker`")
        return
    screen.print()
    screen.print(_workers(state))
    screen.print()
    for spare in state.spares:
        screen.print(printable(f"spare: {spare.worker}: {spare.why}"), soft_wrap=True)
    for worker in state.workers:
        held = [stage for stage in state.stages if stage.worker == worker.name]
        for line in (*_describe_disk(worker), *_describe_problems(worker, held)):
            screen.print(printable(line), soft_wrap=True)


def _describe_problems(worker: WorkerState, held: list[StageState]) -> list[str]:
    """Return a line for each problem of a worker, which holds the stages ``held``."""
    from cluster.cli.screen import format_duration

    lines = []
    if worker.memory_pressure in ("warning", "critical"):
        lines.append(f"{worker.name}: memory pressure is {worker.memory_pressure}")
    if worker.lag_seconds:
        lines.append(describe_overload(worker.name, worker.lag_seconds))
    if abs(worker.clock_ahead_seconds) > CLOCKS_DIFFER_S:
        direction = "ahead" if worker.clock_ahead_seconds > 0 else "behind"
        lines.append(f"{worker.name}'s clock is {format_duration(abs(worker.clock_ahead_seconds))} {direction}")
    if off := describe_deviation(worker.name, held):
        lines.append(off)
    if worker.problem:
        lines.append(f"{worker.name}: {worker.problem}")
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
    return (
        f"{worker}: a step takes {measured:.2f} ms, predicted {predicted:.2f} ms: the Mac is busy now, or was when its"
        " speed was measured; measure again there with `macpipe worker --profile new`"
    )


def _describe_disk(worker: WorkerState) -> list[str]:
    from cluster.cli.screen import format_bytes

    if not worker.prefix_disk_limit:
        return []
    used, limit = format_bytes(worker.prefix_disk_bytes), format_bytes(worker.prefix_disk_limit)
    return [f"{worker.name}: {used} of {limit} of prefixes on disk, {worker.prefix_disk_evictions} evicted"]


def headline(state: ClusterState) -> list[str]:
    """Return the first lines: the state in a sentence, then problems and counts."""
    from cluster.cli.screen import format_duration

    up = format_duration(state.uptime_seconds)
    lines = [f"cluster {state.cluster}: {state.state}{f' {state.model}' if state.model else ''}, up {up}"]
    if state.problem:
        lines.append(f"problem: {state.problem}")
    lines += [f"warning: {warning}" for warning in state.warnings]
    if state.lag_seconds:
        lines.append(
            "problem: the coordinator's machine is overloaded and responds up to"
            f" {state.lag_seconds:.1f} s late: end other programs on it"
        )
    if state.repair:
        lines.append(describe_repair(state.repair))
    if state.move:
        lines.append(describe_move(state.move))
    if state.model:
        lines.append(
            f"{state.layers} layers in {len(state.stages)} stages ({state.route});"
            f" up to {state.max_sequences} answers of {state.max_context} tokens at once"
        )
    if state.adapters:
        lines.append(f"adapters: {', '.join(adapter.name for adapter in state.adapters)}")
    if state.speculation is not Speculation.OFF:
        draft = f", draft model on {state.draft_worker}" if state.draft_worker else ""
        lines.append(f"speculation ({state.speculation}{draft}): {describe_guesses(state)}")
    lines.append(
        f"{len(state.requests)} live requests, {state.requests_finished} finished,"
        f" {state.tokens_generated} tokens generated"
    )
    if state.disk_hits or state.disk_misses:
        lines.append(
            f"{state.disk_hits} prefixes read from disk ({state.disk_tokens} tokens), {state.disk_misses} missed"
        )
    return lines


def describe_guesses(state: ClusterState) -> str:
    """Describe for each source how many of its guesses were right, and how many frames are sent ahead now."""
    shown = [
        f"{one.source} {one.accepted} of {one.guessed} guesses right ({one.accepted / one.guessed:.0%})"
        + (f", {one.rows} in rows" if one.rows else "")
        for one in state.guesses
        if one.guessed
    ]
    parts = [", ".join(shown) or "no guesses yet"]
    if (window := max((request.window for request in state.requests), default=1)) > 1:
        parts.append(f"up to {window} frames of a request in flight")
    if state.guesses_without_room:
        parts.append(f"no memory for the marks of guesses {state.guesses_without_room} times")
    return "; ".join(parts)


def describe_move(move: Repair) -> str:
    """Describe a planned move of layers: cause, step, elapsed and expected time."""
    return f"{move.cause}: {move.doing} for {move.since_seconds:.1f} s{_describe_expected(move)}"


def _describe_expected(repair: Repair) -> str:
    return f", {repair.expected_seconds:.0f} s expected" if repair.expected_seconds else ""


def describe_repair(repair: Repair) -> str:
    """Describe a recovery: elapsed and expected time, attempt, step."""
    expected = _describe_expected(repair)
    return f"for {repair.since_seconds:.1f} s{expected}, attempt {repair.attempts}: {repair.doing}"


def _describe_standing(worker: WorkerState) -> str:
    if worker.standing in ("suspect", "gone"):
        return f"{worker.standing} for {worker.silent_seconds:.0f} s"
    if not worker.reachable:
        return "unreachable"
    return "drained" if worker.draining else "reachable"


def _machine(worker: WorkerState) -> str:
    chip = worker.chip or worker.backend
    return f"{chip}, macOS {worker.macos_version}" if worker.macos_version else chip


def _workers(state: ClusterState) -> Table:
    from cluster.cli.screen import format_bytes, printable, table

    columns = ("worker", "machine", "layers", "weights", "memory used", "predicted", "measured", "state")
    shown = table(*columns, right=RIGHT)
    for worker in state.workers:
        used = f"{format_bytes(worker.memory_used)} of {format_bytes(worker.memory_limit)}"
        held = [stage for stage in state.stages if stage.worker == worker.name]
        shown.add_row(
            printable(worker.name),
            printable(_machine(worker)),
            ", ".join(str(stage.layers) for stage in held) or "-",
            format_bytes(sum(stage.weight_bytes for stage in held)) if held else "-",
            used if worker.reachable else "-",
            *_decode_ms(held),
            _describe_standing(worker),
        )
    return shown


def _decode_ms(held: list[StageState]) -> tuple[str, str]:
    """Format a decode step's predicted and measured milliseconds, or dashes if unknown."""
    if not held:
        return "-", "-"
    predicted, measured = _step_ms(held)
    return f"{predicted:.2f} ms" if predicted else "-", f"{measured:.2f} ms" if measured else "-"


def _step_ms(held: list[StageState]) -> tuple[float, float]:
    """Return a decode step's predicted and measured ms; 0 if unknown.

    Once frames are measured, the prediction is for those same frames.
    """
    measured = sum(stage.measured_ms for stage in held)
    return sum((stage.expected_ms if measured else 0) or stage.predicted_ms for stage in held), measured
