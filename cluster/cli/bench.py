"""``macpipe bench``: how fast a running cluster is, for one user and for several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_QUEUE

if TYPE_CHECKING:
    from cluster.cli.load_generator import LoadLevel, Trial
    from cluster.client import Client, ClusterState

PROMPT: Final = 512
LEAST_PROMPT: Final = 16
"""Shorter ones are not worth keeping to the scheduler, and the second turn needs them kept."""


def bench(
    users: Annotated[str, typer.Option(metavar="N,N,...", help="How many ask at once, one after the other.")] = (
        "1,2,4,8,16"
    ),
    prompt: Annotated[
        int | None, typer.Option(min=LEAST_PROMPT, help=f"Tokens of a prompt. [default: {PROMPT}, or what fits]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often each number of users is measured.")] = 3,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Measure how fast the cluster answers.

    Asks as any client would. Prompts are random tokens, so that no kept prefix serves them; a second turn of each user
    then shows decoding alone. Other requests slow it down and are slowed down, and what it leaves among the kept
    prefixes takes the place of older ones.
    """
    with errors_in_json(json):
        asked = parse_users(users)
        from cluster.cli.load_generator import Trial, measure
        from cluster.client import Client

        with Client(coordinator, cluster=cluster) as client:
            state, address = _require_serving(client), client.address
        trial = Trial(asked, _prompt_length(prompt, tokens, state.max_context), tokens, rounds)
        _announce(trial, state)
        report = measure(address, trial, _tell, cluster)
        if json:
            from cluster.cli.json_output import print_json

            print_json(report)
        else:
            from cluster.cli.bench_tables import show_report

            show_report(report)


def parse_users(written: str) -> tuple[int, ...]:
    """``1,2,4`` in ascending order, each once. Raises InvalidOption."""
    try:
        numbers = sorted({int(one) for one in written.split(",")})
    except ValueError:
        raise InvalidOption(f"--users {written!r} is no list of numbers; write it like 1,2,4", field="users") from None
    if numbers[0] < 1 or numbers[-1] > MAX_QUEUE:
        raise InvalidOption(f"--users {written!r}: each number must be from 1 to {MAX_QUEUE}", field="users")
    return tuple(numbers)


def _require_serving(client: Client) -> ClusterState:
    from cluster.client import ServingState
    from cluster.core.errors import NotServing

    state = client.cluster()
    if state.state is not ServingState.SERVING:
        why = f": {state.problem}" if state.problem else ""
        raise NotServing(f"the coordinator at {client.address} is {state.state}{why}; `macpipe load MODEL` loads one")
    return state


def _prompt_length(prompt: int | None, tokens: int, context: int) -> int:
    """Tokens of a prompt that leaves room for both turns. Raises InvalidOption where what was asked for does not."""
    room = context - 2 * tokens
    wanted = prompt or LEAST_PROMPT
    if room < wanted:
        way = f"--prompt {room}" if room >= LEAST_PROMPT else f"--tokens {max((context - LEAST_PROMPT) // 2, 0)}"
        raise InvalidOption(
            f"a prompt of {wanted} tokens and two answers of {tokens} do not fit the context of {context}; at most"
            f" {way} does, or serve with a larger --max-context",
            field="prompt",
        )
    return prompt or min(PROMPT, room)


def _announce(trial: Trial, state: ClusterState) -> None:
    from cluster.cli.screen import note

    if state.requests:
        note(f"{len(state.requests)} other requests are live: these are the figures of a busy cluster")
    note(
        f"{state.model} on {len(state.stages)} stages: random prompts of {trial.prompt} tokens, answers of"
        f" {trial.tokens}, {trial.rounds} round{'s' * (trial.rounds != 1)} ..."
    )


def _tell(level: LoadLevel) -> None:
    """One line of progress."""
    from cluster.cli.screen import note

    rate = level.answers.tokens_per_second
    note(f"{level.users} user{'s' * (level.users != 1)}: {rate:.1f} tokens/s once the prompts are read")
    if not any(stage.compute_ms for stage in level.stages):
        note("  the stages had no room to keep these prompts, so the second turn read them again")
