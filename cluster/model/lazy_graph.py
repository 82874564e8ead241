"""Questions to MLX's lazy graph: what does this array depend on? Nothing is evaluated to answer them.

``mx.export_to_dot`` is the only public view of the graph; this module is the only reader of its text. It knows arrays
and their names, nothing of layers.
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
    """The graph above some arrays.

    ``parameters`` (path -> evaluated array) are its leaves; ``arrays`` are the ones that will be asked about.
    ``paths`` maps a leaf's node name to its path.
    """

    def __init__(self, parameters: Mapping[str, mx.array], arrays: Iterable[mx.array]) -> None:
        self._named = {f"n_{i}": array for i, array in enumerate({id(a): a for a in arrays}.values())}
        self._names = {id(array): name for name, array in self._named.items()}
        lines = _dot_lines(list(parameters.values()), self._named)
        # Leaves are printed first and in order, after the line that opens the graph.
        leaves = [match[1] for match in map(_LEAF.match, lines[1 : 1 + len(parameters)]) if match]
        if len(leaves) != len(parameters):
            raise RuntimeError("mx.export_to_dot prints its leaves in another way than this version of macpipe knows")
        self.paths = dict(zip(leaves, parameters, strict=True))
        self._inputs = _read_inputs(lines)

    def nodes(self, arrays: Iterable[mx.array]) -> list[str]:
        """Node names of arrays that were given to the constructor."""
        return [self._names[id(array)] for array in arrays]

    def ancestors(self, arrays: Iterable[mx.array], stop: Iterable[mx.array] = ()) -> set[str]:
        """Node names that ``arrays`` depend on, themselves included, not looking past the arrays in ``stop``."""
        walls = {*self.nodes(stop), *self.paths}
        todo, seen = self.nodes(arrays), set[str]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo.extend(() if node in walls else self._inputs.get(node, ()))
        return seen

    def parameters_in(self, nodes: Iterable[str]) -> set[str]:
        """Paths of the parameters among ``nodes``."""
        return {self.paths[node] for node in nodes if node in self.paths}


def _dot_lines(leaves: list[mx.array], named: Mapping[str, mx.array]) -> list[str]:
    text = io.StringIO()
    # Parameters go in by position: a call takes at most 1,024 keywords, and models have more parameters than that.
    mx.export_to_dot(text, *leaves, **named)
    return text.getvalue().splitlines()


def _read_inputs(lines: list[str]) -> dict[str, list[str]]:
    """Node -> the nodes it is computed from.

    Read operation by operation: a primitive can be shared by several nodes (replayed mx.compile tapes), so its number
    does not identify one operation.
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
