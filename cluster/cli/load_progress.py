"""Shows a load on a terminal: the workers, the plan as a table, a progress bar per worker, then the address.

It decides nothing. If stderr is not a terminal, it writes plain lines, and fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from cluster.cli.command_name import command_name
from cluster.cli.screen import console, format_bytes, format_duration, print_lines, printable, table
from cluster.client.coordinator_address import DEFAULT_HOST, DEFAULT_PORT
from cluster.core.plan import Forecast, LayerRange, LoadProgress, Plan, Route, Spare
from cluster.core.text import (
    count_in_words,
    figure_in_words,
    format_address,
    is_loopback,
    names_in_words,
    parse_address,
    place_in_words,
)
from cluster.core.worker import WorkerInfo

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from cluster.store.tensor_fetch import Fetched

BAR_WIDTH: Final = 16
"""Narrow enough for a line with a worker's name, sizes, speed and state in 80 columns."""
PLAIN_STEP: Final = 10
"""Percent of progress between two plain lines of one worker."""


class LoadBars:
    """Progress of a load: one bar per worker, or some lines."""

    def __init__(self, stream: TextIO) -> None:
        self._console = console(stream)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, tuple[int, str]] = {}
        self._noticed: set[tuple[str, str]] = set()

    def show(self, progress: LoadProgress) -> None:
        """Print the stage's new notices, then draw its progress."""
        for notice in [n for n in progress.notices if (progress.worker, n) not in self._noticed]:
            self._noticed.add((progress.worker, notice))
            print_lines(self._console, f"{progress.worker}: {notice}")
        sources = [(progress.hub_bytes, "the hub"), (progress.peer_bytes, "other Macs")]
        received = ", ".join(f"{format_bytes(count)} from {source}" for count, source in sources if count)
        model = f" draft model {progress.draft}," if progress.draft else ""
        own = f"{progress.model}: " if progress.model else ""
        what = f"{own}{progress.worker}{model} layers {progress.layers}"
        state = f"{progress.state} ({received})" if received else progress.state
        self.show_as(what, state, progress.done_bytes, progress.total_bytes)

    def show_as(self, what: str, state: str, done: int, total: int) -> None:
        """Draw the progress of ``what``. ``state`` names the current step."""
        if self._console.is_terminal:
            self._draw(what, state, done, total)
        else:
            self._write(what, state, done, total)

    def close(self) -> None:
        """Stop updating the bars. Later output appears below them."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()
        self._printed.clear()
        self._noticed.clear()

    def _draw(self, what: str, state: str, done: int, total: int) -> None:
        bars = self._bars = self._bars or self._start_bars()
        known = self._tasks.get(what)
        task = bars.add_task("", start=True, state="", visible=False) if known is None else known
        self._tasks[what] = task
        shown = printable(state)
        bars.update(task, description=printable(what), completed=done, total=total or None, state=shown, visible=True)

    def _start_bars(self) -> Progress:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        description = TextColumn("{task.description}", markup=False)
        state = TextColumn("{task.fields[state]}", markup=False, style="dim")
        sizes = DownloadColumn(binary_units=True)
        bars = Progress(description, BarColumn(BAR_WIDTH), sizes, TransferSpeedColumn(), state, console=self._console)
        bars.start()
        return bars

    def _write(self, what: str, state: str, done: int, total: int) -> None:
        percent = 100 * done // total if total else 0
        step = (percent // PLAIN_STEP, state.partition(" ")[0])
        if self._printed.get(what) != step:
            self._printed[what] = step
            far = f", {percent}% of {format_bytes(total)}" if total else ""
            self._console.print(f"{what}: {state}{far}", soft_wrap=True)


class PullBar:
    """Progress of one download: a bar, or some lines."""

    def __init__(self, stream: TextIO, model: str) -> None:
        self._model = model
        self._bars = LoadBars(stream)

    def show(self, fetched: Fetched) -> None:
        """Draw the progress."""
        self._bars.show_as(printable(self._model), fetched.state, fetched.done, fetched.total)

    def close(self) -> None:
        """Stop updating the bar."""
        self._bars.close()


class TerminalReport:
    """The ``Report`` of ``macpipe serve``. As a context manager, it also stops its bars after an error."""

    def __init__(self, stream: TextIO) -> None:
        self._console = console(stream)
        self._bars = LoadBars(stream)
        self._found: tuple[tuple[str, ...], int | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.close()

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        """Print the workers found so far, if they or the number of those to find changed."""
        names = tuple(sorted(f"{one.name} ({one.chip or one.backend})" for one in found if not one.draining))
        drained = [f"; {one.name} is drained: `macpipe drain {one.name} --undo`" for one in found if one.draining]
        if ((*names, *drained), wanted) == self._found:
            return
        self._found = (*names, *drained), wanted
        some = count_in_words(len(names), "worker")
        count = f"{len(names)} of {wanted} workers" if wanted and len(names) <= wanted else some
        known = f"{count}: {', '.join(names)}" if names else f"waiting for {_describe_wanted(wanted)}"
        self._print_line(f"{known}{''.join(drained)}")

    def planned(self, plan: Plan) -> None:
        """Print the plan."""
        self._print_line(
            f"{plan.model.name}, with room for {plan.max_sequences} x {plan.max_context} tokens of context:"
        )
        stages = [
            (
                place_in_words(s.spec.index, s.spec.rank, s.spec.ranks),
                s.worker,
                s.layers,
                s.weight_bytes,
                s.cache_bytes,
                s.decode_ms,
            )
            for s in plan.stages
        ]
        self._console.print(stage_table(stages))
        for line in describe_forecast(plan.forecast, plan.spares, plan.reasons):
            self._print_line(line)
        if plan.route is Route.RELAY:
            self._print_line("activations are relayed by this coordinator")

    def progress(self, progress: LoadProgress) -> None:
        """Update a worker's bar."""
        self._bars.show(progress)

    def serving(self, addresses: Sequence[str], plan: Plan, http: str, names: Sequence[str] = ()) -> None:
        """Print the addresses, and the commands that work here and on other Macs of the cluster."""
        self._bars.close()
        here, *elsewhere = addresses
        grpc = " and ".join(addresses)
        first, *others = names or (plan.model.name,)
        self._print_line(f"serving {first} on {grpc}{f', and on {http}' if http else ''}")
        if others:
            known = names_in_words(others)
            self._print_line(f"requests may also name {known}: a model is loaded when it is needed")
        default = here == f"{DEFAULT_HOST}:{DEFAULT_PORT}"
        command = f"{command_name()} generate -p 'Hello'"
        self._print_line(f"try: {command}{'' if default else f' --coordinator {here}'}")
        for address in elsewhere:
            self._print_line(f"on another Mac of the cluster: macpipe chat --coordinator {address}")
        if elsewhere and http and is_loopback(parse_address(http.partition("://")[2])[0]):
            host = parse_address(elsewhere[0])[0]
            self._print_line(f"HTTP is for this Mac alone; --http {format_address(host, 8080)} serves other Macs too")

    def problem(self, sentence: str) -> None:
        """Print a problem that the operator should know."""
        self._bars.close()
        self._print_line(f"macpipe: {sentence}")

    def _print_line(self, line: str) -> None:
        print_lines(self._console, line)


def stage_table(stages: Iterable[tuple[str, str, LayerRange, int, int, float]]) -> Table:
    """Format a plan's stages: place, worker, layers, weight bytes, bytes left for caches, ms per step (0: unknown)."""
    numbers = frozenset({"weights", "left for caches", "ms a token"})
    shown = table("stage", "worker", "layers", "weights", "left for caches", "ms a token", right=numbers)
    for place, worker, layers, weights, left, ms in stages:
        figures = (format_bytes(weights), format_bytes(left), f"{ms:.1f}" if ms else "-")
        shown.add_row(place, printable(worker), str(layers), *figures)
    return shown


def describe_forecast(forecast: Forecast | None, spares: Iterable[Spare], reasons: Iterable[str]) -> Iterator[str]:
    """Yield lines with a plan's predicted speed, its spare workers and its reasons."""
    if forecast:
        yield (
            f"predicted: {figure_in_words(forecast.one_user)} tokens/s for one user,"
            f" {figure_in_words(forecast.eight_users)} for eight together; {forecast.prompt_tokens} tokens of prompt"
            f" take {format_duration(forecast.first_token_s)} to the first token"
        )
    yield from (f"spare: {spare.worker}: {spare.why}" for spare in spares)
    yield from reasons


def _describe_wanted(wanted: int | None) -> str:
    if wanted is None:
        return "workers (start one with `macpipe worker`)"
    return f"{count_in_words(wanted, 'worker')} (start one with `macpipe worker`)"
