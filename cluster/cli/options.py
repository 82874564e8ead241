"""The options that several commands share, and how the options of an answer get into a command.

It turns words of the command line into ``cluster.client.Options``; what a value may be, the coordinator says.
(Annotations are evaluated here, not kept as text: ``takes_answer_options`` moves them to other modules.)
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.core.errors import InvalidOption

if TYPE_CHECKING:
    from cluster.client import Options

Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="The coordinator; else MACPIPE_COORDINATOR, else 127.0.0.1:7700."),
]
Cluster = Annotated[
    str | None, typer.Option(metavar="NAME", help="The coordinator's cluster; else MACPIPE_CLUSTER, else default.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def answer_options(
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this total probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw from this many likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: say again less often.")] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: prefer what the answer has not said.")
    ] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, by how often it was said.")] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN=BIAS", help="Favour a token id, or avoid it. Repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's own end.")] = False,
    model: Annotated[str, typer.Option(metavar="MODEL", help="Insist on this model.")] = "",
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after this long.")] = None,
) -> "Options":
    """The options that were given, for the client."""
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": parse_biases(logit_bias or ()),
        "seed": seed,
        "stop": stop or (),
        "ignore_eos": ignore_eos,
        "model": model,
        "timeout_s": timeout,
    }


def takes_answer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the parameters of ``answer_options`` in place of its own parameter ``options``."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(answer_options).parameters

    def run(**given: Any) -> None:
        options = answer_options(**{name: given.pop(name) for name in shared})
        command(**given, options=options)

    merged = {name: one for name, one in own.items() if name != "options"} | dict(shared)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: one.annotation for name, one in merged.items()}
    return run


def parse_biases(given: list[str] | tuple[str, ...]) -> dict[int, float] | None:
    """``["5=-1.5"]`` as ``{5: -1.5}``; None where there are none. Raises InvalidOption."""
    try:
        pairs = [one.split("=") for one in given]
        return {int(token): float(bias) for token, bias in pairs} or None
    except ValueError:
        raise InvalidOption("--logit-bias takes TOKEN=BIAS, for example 1234=-5", field="logit_bias") from None
