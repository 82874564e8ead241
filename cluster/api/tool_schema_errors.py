"""Names the tool whose schema cannot be compiled. Clients send tools and do not know the grammar made from them."""

from __future__ import annotations

import anyio

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidGrammar
from cluster.core.limits import TOOL_CHECK_TIMEOUT_S
from cluster.core.request import Grammar, GrammarKind, Request


async def find_invalid_tool(
    error: InvalidGrammar, request: Request, model_info: ModelInfo, coordinator: Coordinator
) -> InvalidGrammar:
    """Return an error that names the tool with the invalid parameters, with the field ``tools[i]``.

    Return ``error`` unchanged if it does not come from a tool, or no tool is found within ``TOOL_CHECK_TIMEOUT_S``.
    """
    tools = request.parsing.tools if request.parsing else ()
    if error.field != GrammarKind.LARK.value or not tools:
        return error
    with anyio.move_on_after(TOOL_CHECK_TIMEOUT_S):
        for i, tool in enumerate(tools):
            if not tool.parameters:
                continue
            try:
                await coordinator.check_grammar(Grammar(GrammarKind.JSON_SCHEMA, tool.parameters), model_info)
            except InvalidGrammar as found:
                return InvalidGrammar(
                    f"tool_choice requires a call that follows the tool's schema, but the parameters of tool "
                    f"{tool.name!r} cannot be enforced: {found.sentence}",
                    field=f"tools[{i}]",
                )
    return error
