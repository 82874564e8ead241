"""Options that several commands share, and their conversion to ``cluster.client.Options``.

This module does not import ``annotations`` from ``__future__``, because
``takes_options`` moves its evaluated annotations to other modules.
"""

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cluster.core.errors import InvalidOption
from cluster.core.request import SAMPLING_RANGES
from cluster.platform.logs import LEVEL_VARIABLE, LogLevel

if TYPE_CHECKING:
    from cluster.client import Options
    from cluster.security.cluster_folder import ClusterFolder

T = TypeVar("T")


class Switch(StrEnum):
    """The values of an option that is on or off."""

    ON = "on"
    OFF = "off"


Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The coordinator, or several with commas; else MACPIPE_COORDINATOR, else what is found.",
    ),
]
_CLUSTER = {"metavar": "NAME", "envvar": "MACPIPE_CLUSTER", "help": "The cluster's name on this Mac."}
Cluster = Annotated[str | None, typer.Option(**_CLUSTER, show_default="the last one entered, else default")]
"""``cluster.security.cluster_choice`` resolves None."""
NewCluster = Annotated[str, typer.Option(**_CLUSTER)]
"""For ``init``, which makes the cluster."""
CONTEXT_HELP = "Reserve memory for this many tokens of prompt and answer."
Level = Annotated[
    LogLevel,
    typer.Option("--log-level", envvar=LEVEL_VARIABLE, case_sensitive=False, help="Log lines of this level and above."),
]
Home = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="The state folder; else MACPIPE_HOME, else the default.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


TopK = Annotated[int | None, typer.Option(min=0, metavar="N", help="Sample from this many most likely tokens.")]
AdapterName = Annotated[str, typer.Option(metavar="NAME", help="Answer with this adapter of the model.")]
Timeout = Annotated[float | None, typer.Option(metavar="SECONDS", help="Deadline of the answer.")]


def open_folder(home: Path | None, cluster: str | None) -> "ClusterFolder":
    """Return the folder of the cluster that a command means, by its options ``--home`` and ``--cluster``."""
    from cluster.platform.paths import state_home
    from cluster.security.cluster_choice import resolve_cluster
    from cluster.security.cluster_folder import ClusterFolder

    folder = state_home(home)
    return ClusterFolder(folder, resolve_cluster(cluster, folder))


def require_coordinator(folder: "ClusterFolder") -> None:
    """Raise ``NoCluster`` if this Mac has no coordinator in the cluster of ``folder``."""
    from cluster.core.errors import NoCluster

    if not folder.coordinates:
        raise NoCluster(
            f"this Mac has no coordinator in a cluster named {folder.cluster}: create one with `macpipe init`, or run"
            " this command on a coordinator's Mac"
        )


def _range(name: str) -> dict[str, Any]:
    """Return the arguments of ``typer.Option`` for a number within the range of the sampling parameter ``name``."""
    least, most = SAMPLING_RANGES[name]
    return {"metavar": "NUMBER", "min": least, "max": most}


def answer_options(
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Maximum length of the answer, in tokens.", show_default="512, or what fits"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(**_range("temperature"), help="0 always picks the most likely token.", show_default="0"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(**_range("top_p"), help="Sample from the most likely tokens of this total probability."),
    ] = None,
    top_k: TopK = None,
    min_p: Annotated[
        float | None, typer.Option(**_range("min_p"), help="Drop tokens below this fraction of the top probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(**_range("repetition_penalty"), help="Above 1: repeat tokens less often.")
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(**_range("presence_penalty"), help="Above 0: prefer tokens that are not in the answer yet."),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(**_range("frequency_penalty"), help="Above 0: avoid tokens by how often they occurred."),
    ] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN=BIAS", help="Make a token id more or less likely. Repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Random seed; the same seed gives the same answer.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text. Repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end-of-sequence token.")] = False,
    model: Annotated[str, typer.Option(metavar="MODEL", help="Require this model.")] = "",
    adapter: AdapterName = "",
    timeout: Timeout = None,
) -> "Options":
    """Return the command line's options for the client."""
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
        "adapter": adapter,
        "timeout_s": timeout,
    }


def takes_options(shared: Callable[..., Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator for commands: it replaces their parameter ``options`` by the parameters of ``shared``.

    The command gets what ``shared`` returns. What a command returns is of use to other functions that take its options.
    """
    parameters = inspect.signature(shared).parameters

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        def run(**given: Any) -> T:
            options = shared(**{name: given.pop(name) for name in parameters})
            return command(**given, options=options)

        merged: dict[str, inspect.Parameter] = {}
        for name, one in inspect.signature(command, eval_str=True).parameters.items():
            merged |= parameters if name == "options" else {name: one}
        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {name: one.annotation for name, one in merged.items()}
        return run

    return decorate


def parse_biases(given: list[str] | tuple[str, ...]) -> dict[int, float] | None:
    """Parse ``["5=-1.5"]`` into ``{5: -1.5}``, or None if empty. Raise InvalidOption."""
    try:
        pairs = [one.split("=") for one in given]
        return {int(token): float(bias) for token, bias in pairs} or None
    except ValueError:
        raise InvalidOption("--logit-bias takes TOKEN=BIAS, for example 1234=-5", field="logit_bias") from None
