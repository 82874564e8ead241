"""Prints plans: of one model as a table of its stages, of several also what they use of each Mac's memory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cluster.cli.load_progress import describe_forecast, stage_table
from cluster.cli.screen import console, format_bytes, print_lines, printable, table
from cluster.core.cluster_state import count_stages
from cluster.core.text import count_in_words, names_in_words

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.client import JointPlan, ModelPlan
    from cluster.core.joint_plan import PlannedModel


def show_plan(made: ModelPlan, json: bool) -> None:
    """Print one JSON object on stdout, or a table and the plan's reasons."""
    if json:
        from cluster.cli.json_output import print_json

        print_json(made)
        return
    screen = console(sys.stdout)
    print_lines(
        screen,
        f"{made.model}: {count_in_words(made.layers, 'layer')} in {count_stages(made.stages)}, planned"
        f" for {made.objective}; room for {made.max_sequences} x {made.max_context} tokens of context",
    )
    screen.print()
    stages = [(s.place, s.worker, s.layers, s.weight_bytes, s.cache_bytes, s.predicted_ms) for s in made.stages]
    screen.print(stage_table(stages))
    screen.print()
    print_lines(screen, *describe_forecast(made.forecast, made.spares, made.reasons))


def show_joint_plan(made: JointPlan, json: bool) -> None:
    """Print one JSON object on stdout, or the models' stages, the Macs' memory and the reasons."""
    if json:
        from cluster.cli.json_output import print_json

        print_json(made)
        return
    screen = console(sys.stdout)
    count = sum(model.replica == 1 for model in made.models)
    fitting = f"{count} of {count + len(made.left_out)}" if made.left_out else str(count)
    print_lines(screen, f"{fitting} {'model fits' if fitting == '1' else 'models fit at once'}")
    screen.print()
    screen.print(_stages_of_all(made))
    screen.print()
    screen.print(_memory_of_all(made))
    screen.print()
    print_lines(screen, *made.reasons)
    for model in made.models:
        screen.print()
        plan = model.plan
        print_lines(
            screen,
            f"{_name_of(model)}: planned for {plan.objective};"
            f" room for {plan.max_sequences} x {plan.max_context} tokens of context",
            *describe_forecast(plan.forecast, (), plan.reasons),
        )


def _stages_of_all(made: JointPlan) -> Table:
    numbers = frozenset({"weights", "for caches", "ms a token"})
    shown = table("model", "worker", "layers", "weights", "for caches", "ms a token", right=numbers)
    for model in made.models:
        for stage in model.plan.stages:
            name = printable(_name_of(model)) if stage is model.plan.stages[0] else ""
            ms = f"{stage.predicted_ms:.1f}" if stage.predicted_ms else "-"
            sizes = format_bytes(stage.weight_bytes), format_bytes(stage.cache_bytes)
            shown.add_row(name, printable(stage.worker), stage.share, *sizes, ms)
    return shown


def _name_of(model: PlannedModel) -> str:
    return f"{model.name} #{model.replica}" if model.replica > 1 else model.name


def _memory_of_all(made: JointPlan) -> Table:
    numbers = frozenset({"memory", "weights", "for caches", "free"})
    shown = table("worker", "memory", "weights", "for caches", "free", "models", right=numbers)
    for mac in made.memory:
        weights = sum(model.weight_bytes for model in mac.models)
        caches = sum(model.cache_bytes for model in mac.models)
        sizes = map(format_bytes, (mac.usable_bytes, weights, caches, mac.free_bytes))
        names = names_in_words([model.name for model in mac.models]) if mac.models else "none"
        shown.add_row(printable(mac.worker), *sizes, printable(names))
    return shown
