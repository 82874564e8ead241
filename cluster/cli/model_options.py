"""The options of ``serve`` that belong to a model. A models file sets them for one model alone."""

# No "from __future__ import annotations": ``takes_options`` moves evaluated annotations to other modules.

from typing import Annotated, Any

import typer

from cluster.cli.options import CONTEXT_HELP, Switch, takes_options
from cluster.cli.plan_options import order_options, plan_options
from cluster.core.limits import MAX_STEP_MS
from cluster.core.plan import Speculation

STEP_HELP = "Limit a prefill chunk's time on a stage while others decode."
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face id (OWNER/NAME[@REVISION]), a folder, or faq: the bundled model."
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help=CONTEXT_HELP,
        show_default="4096, or less",
    ),
]
MaxStepMs = Annotated[float, typer.Option(min=1, metavar="MS", help=STEP_HELP)]
Speculate = Annotated[
    Speculation,
    typer.Option(
        help="Guess tokens from texts that the client has, from a draft model, or both, and compute them ahead: faster "
        "for one user, same tokens."
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="Draft model for --speculate auto or draft, on a spare Mac. faq-draft is the bundled one, for faq.",
        show_default="none",
    ),
]
Exact = Annotated[
    Switch,
    typer.Option(
        help="off: a step may compute several guesses where that is measured to be cheap. Tokens then may differ where "
        "two nearly tie."
    ),
]
TakeBack = Annotated[
    bool,
    typer.Option(
        "--take-back", help="Give lost workers their layers back when they return. By default they become spares."
    ),
]


@takes_options(plan_options)
def model_options(
    options: Any = None,
    max_context: MaxContext = None,
    max_step_ms: MaxStepMs = MAX_STEP_MS,
    speculate: Speculate = Speculation.OFF,
    draft: Draft = "",
    exact: Exact = Switch.ON,
    take_back: TakeBack = False,
) -> dict[str, Any]:
    """Return keyword arguments of ``LoadOrder``. Raise as ``plan_options``."""
    return {
        "max_context": max_context,
        "max_step_ms": max_step_ms,
        "speculation": speculate,
        "draft": draft,
        "exact": exact is Switch.ON,
        "take_back": take_back,
        **order_options(options),
    }
