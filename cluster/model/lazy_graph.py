"""Finds what an array depends on in MLX's lazy graph, without evaluating anything.

``mx.export_to_dot`` is the only public view of the graph; only this module parses its text. It knows arrays and their
names, nothing of layers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

__all__ = ["LazyGraph"]

_LEAF = re.compile(r'\{ rank=source; "(\w+)"; \}')
_INPUT = re.compile(r'"(\w+)" -> \d+')
_OUTPUT = re.compile(r'\d+ -> "(\w+)"')


class LazyGraph:
    """The graph that computes ``arrays`` from ``parameters``.

    ``parameters`` (path -> evaluated array) are its leaves; ``arrays`` are those that later calls may pass. ``paths``
    maps a leaf's node name to its path. Raises RuntimeError if MLX prints the graph in an unknown format.
    """

    def __init__(self, parameters: Mapping[str, mx.array], arrays: Iterable[mx.array]) -> None:
        self._named = {f"n_{i}": array for i, array in enumerate({id(a): a for a in arrays}.values())}
        self._names = {id(array): name for name, array in self._named.items()}
        lines = _dot_lines(list(parameters.values()), self._named)
        # MLX prints the leaves first and in order, after the line that opens the graph.
        leaves = [match[1] for match in map(_LEAF.match, lines[1 : 1 + len(parameters)]) if match]
        if len(leaves) != len(parameters):
            raise RuntimeError(
                "mx.export_to_dot prints leaves in an unknown format; install the version of MLX that macpipe pins"
            )
        self.paths = dict(zip(leaves, parameters, strict=True))
        self._inputs = _read_inputs(lines)

    def nodes(self, arrays: Iterable[mx.array]) -> list[str]:
        """Return the node names of ``arrays``, which must be among the constructor's."""
        return [self._names[id(array)] for array in arrays]

    def ancestors(self, arrays: Iterable[mx.array], stop: Iterable[mx.array] = ()) -> set[str]:
        """Return the names of ``arrays`` and all nodes they depend on; the search ends at the arrays in ``stop``."""
        barriers = {*self.nodes(stop), *self.paths}
        todo = self.nodes(arrays)
        seen: set[str] = set()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo.extend(() if node in barriers else self._inputs.get(node, ()))
        return seen

    def parameters_in(self, nodes: Iterable[str]) -> set[str]:
        """Return the paths of the parameters among ``nodes``."""
        return {self.paths[node] for node in nodes if node in self.paths}


def _dot_lines(leaves: list[mx.array], named: Mapping[str, mx.array]) -> list[str]:
    text = io.StringIO()
    # Parameters are positional: a call takes at most 1,024 keywords, and models have more parameters than that.
    mx.export_to_dot(text, *leaves, **named)
    return text.getvalue().splitlines()


def _read_inputs(lines: list[str]) -> dict[str, list[str]]:
    """Return each node's inputs.

    The lines are read operation by operation: several nodes can share a primitive (replayed mx.compile tapes), so its
    number does not identify one operation.
    """
    inputs: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if "[label" in line:
            current = []
        elif match := _INPUT.match(line):
            current.append(match[1])
        elif match := _OUTPUT.match(line):
            inputs[match[1]] = current
    return inputs
