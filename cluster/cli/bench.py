"""``macpipe bench``: measures the speed of a running cluster for one and for several users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.cluster_state import count_stages
from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_QUEUE
from cluster.core.text import count_in_words

if TYPE_CHECKING:
    from cluster.cli.load_generator import BenchReport, LoadLevel, Trial
    from cluster.client import Client, ClusterState

PROMPT: Final = 512
LEAST_PROMPT: Final = 16
"""The scheduler does not cache shorter prefixes, and the second turn needs a cached prefix."""


def bench(
    users: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of concurrent users, measured one after the other.")
    ] = ("1,2,4,8,16"),
    prompt: Annotated[
        int | None,
        typer.Option(min=LEAST_PROMPT, metavar="N", help=f"Tokens per prompt. [default: {PROMPT}, or what fits]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Rounds per number of users.")] = 3,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the rates, and how long each stage was idle, as an SVG picture."),
    ] = None,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Measure how fast the cluster answers.

    Sends requests through the public API. Prompts are random tokens, so the prefix cache does not help. A second turn
    of each user then measures decoding alone. Other requests and the bench slow each other down, and the bench's
    prompts replace older entries of the prefix cache.
    """
    with errors_in_json(json):
        asked = parse_users(users)
        if plot:
            _check_picture(plot)
        from cluster.cli.load_generator import Trial, measure
        from cluster.client import Client

        with Client(coordinator, cluster=cluster) as client:
            state, address = _require_serving(client), client.address
        trial = Trial(asked, _prompt_length(prompt, tokens, state.max_context), tokens, rounds)
        _announce(trial, state)
        report = measure(address, trial, _print_progress, cluster)
        if plot:
            _draw(report, plot)
        if json:
            from cluster.cli.json_output import print_json

            print_json(report)
        else:
            from cluster.cli.bench_tables import show_report

            show_report(report)


def parse_users(written: str) -> tuple[int, ...]:
    """Parse ``1,2,4`` into ascending numbers without duplicates. Raise InvalidOption."""
    try:
        numbers = sorted({int(one) for one in written.split(",")})
    except ValueError:
        raise InvalidOption(
            f"--users {written!r} is not a list of numbers; use a form like 1,2,4", field="users"
        ) from None
    if numbers[0] < 1 or numbers[-1] > MAX_QUEUE:
        raise InvalidOption(f"--users {written!r}: each number must be from 1 to {MAX_QUEUE}", field="users")
    return tuple(numbers)


def _check_picture(file: Path) -> None:
    """Raise InvalidOption unless ``file`` is named as an SVG picture and can be written: a bench takes minutes."""
    if file.suffix.lower() != ".svg":
        raise InvalidOption(f"--plot {file}: the picture is SVG; use a name that ends with .svg", field="plot")
    is_new = not file.exists()
    try:
        file.open("ab").close()
        if is_new:
            file.unlink()
    except OSError as e:
        raise InvalidOption(f"--plot {file} cannot be written: {e.strerror or e}", field="plot") from None


def _draw(report: BenchReport, file: Path) -> None:
    """Write the picture of a report. A file that cannot be written must not cost the figures: it is a note."""
    from cluster.cli.bench_plot import draw_report
    from cluster.cli.screen import note

    try:
        file.write_text(draw_report(report), encoding="utf-8")
    except OSError as e:
        note(f"{file} was not written: {e.strerror or e}")
    else:
        note(f"wrote {file}")


def _require_serving(client: Client) -> ClusterState:
    from cluster.client import ServingState
    from cluster.core.errors import NotServing

    state = client.cluster()
    if state.state is not ServingState.SERVING:
        why = f": {state.problem}" if state.problem else ""
        raise NotServing(
            f"the coordinator at {client.address} is {state.state}{why}; load a model with `macpipe load MODEL`"
        )
    return state


def _prompt_length(prompt: int | None, tokens: int, context: int) -> int:
    """Return a prompt length in tokens that leaves room for both turns. Raise InvalidOption if ``prompt`` does not."""
    room = context - 2 * tokens
    wanted = prompt or LEAST_PROMPT
    if room < wanted:
        largest = f"--prompt {room}" if room >= LEAST_PROMPT else f"--tokens {max((context - LEAST_PROMPT) // 2, 0)}"
        raise InvalidOption(
            f"a prompt of {wanted} tokens and two answers of {tokens} exceed the context of {context} tokens; use at"
            f" most {largest}, or serve with a larger --max-context",
            field="prompt",
        )
    return prompt or min(PROMPT, room)


def _announce(trial: Trial, state: ClusterState) -> None:
    from cluster.cli.screen import note

    if state.requests:
        others = count_in_words(len(state.requests), "other request")
        note(f"live beside the bench: {others}, so the results are those of a busy cluster")
    note(
        f"{state.model} on {count_stages(state.stages)}: random prompts of {trial.prompt} tokens,"
        f" answers of {trial.tokens}, {count_in_words(trial.rounds, 'round')} ..."
    )


def _print_progress(level: LoadLevel) -> None:
    """Print one line of progress on stderr."""
    from cluster.cli.screen import note

    rate = level.answers.tokens_per_second
    note(f"{level.users} user{'s' * (level.users != 1)}: {rate:.1f} tokens/s after prefill")
    if not any(stage.compute_ms for stage in level.stages):
        note("  the stages had no room to keep these prompts, so the second turn repeated their prefill")
