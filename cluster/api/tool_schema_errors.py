"""Which tool it is, where the grammar of calls cannot be compiled: clients wrote tools, and know of no grammar."""

from __future__ import annotations

import anyio

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidGrammar
from cluster.core.limits import BLAME_TIMEOUT_S
from cluster.core.request import Grammar, GrammarKind, Request

_OURS = "the json_schema cannot be compiled: "


async def blame_tool(
    error: InvalidGrammar, request: Request, checkpoint: ModelInfo, coordinator: Coordinator
) -> InvalidGrammar:
    """``error`` in terms of the tool whose parameters are at fault, with the field ``tools[i]``; else as it is."""
    tools = request.parsing.tools if request.parsing else ()
    if error.field != GrammarKind.LARK.value or not tools:
        return error
    with anyio.move_on_after(BLAME_TIMEOUT_S):
        for i, tool in enumerate(tools):
            if not tool.parameters:
                continue
            try:
                await coordinator.check_grammar(Grammar(GrammarKind.JSON_SCHEMA, tool.parameters), checkpoint)
            except InvalidGrammar as found:
                why = found.sentence.removeprefix(_OURS)
                return InvalidGrammar(
                    f"the parameters of tool {tool.name!r} cannot be enforced, which tool_choice asks for: {why}",
                    field=f"tools[{i}]",
                )
    return error
