"""A radix tree over token ids. It finds the kept prefix that has the longest common prefix with a prompt.

It knows sequences of integers, the ids they are stored under, and their marked lengths, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]

_BLOCK = 256
"""Tokens that are compared at once."""


@dataclass(slots=True)
class _Node:
    """A node of the tree. ``edge``: the tokens from its parent to here; ``entry``: the id that ends here, if any.

    ``marked``: the ids of longer entries that are marked here.
    """

    edge: Tokens = ()
    entry: int | None = None
    marked: set[int] = field(default_factory=set)
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """An entry, and a number of its first tokens with which the query begins too."""

    entry: int
    length: int


class RadixTree:
    """Entry ids by token sequence. Each token sequence has at most one entry; each entry may have marked lengths."""

    def __init__(self) -> None:
        self._root = _Node()
        self._tokens: dict[int, Tokens] = {}
        self._marks: dict[int, frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, entry: int) -> Tokens:
        return self._tokens[entry]

    def insert(self, tokens: Tokens, entry: int, marks: Iterable[int] = ()) -> int | None:
        """Store an entry that is marked at the lengths ``marks``, each from 1 to its own length.

        Return the id of the entry with the same tokens that it replaces, or None.
        """
        replaced = self._node_of(tokens).entry
        if replaced is not None:
            self.remove(replaced)
        self._tokens[entry] = tokens
        self._marks[entry] = frozenset(marks) - {len(tokens)}
        self._node_of(tokens).entry = entry
        for length in self._marks[entry]:
            self._node_of(tokens[:length]).marked.add(entry)
        return replaced

    def _node_of(self, tokens: Tokens) -> _Node:
        """Return the node at which ``tokens`` end; create it if there is none."""
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                child = node.children[tokens[at]] = _Node(tokens[at:])
            shared = shared_length(child.edge, tokens[at : at + len(child.edge)])
            if shared < len(child.edge):
                child = self._split(node, child, shared)
            node, at = child, at + shared
        return node

    def _split(self, parent: _Node, child: _Node, at: int) -> _Node:
        upper = _Node(child.edge[:at])
        parent.children[child.edge[0]] = upper
        child.edge = child.edge[at:]
        upper.children[child.edge[0]] = child
        return upper

    def remove(self, entry: int) -> None:
        """Remove an entry. Do nothing if it does not exist."""
        tokens = self._tokens.pop(entry, None)
        if tokens is None:
            return
        path = list(self._path(tokens))
        path[-1].entry = None
        if self._marks.pop(entry):
            for node in path:
                node.marked.discard(entry)
        for parent, node in zip(path[-2::-1], path[:0:-1], strict=True):
            _prune(parent, node)

    def _path(self, tokens: Tokens) -> Iterator[_Node]:
        """Yield the nodes from the root to the node where these stored tokens end."""
        node, at = self._root, 0
        yield node
        while at < len(tokens):
            node = node.children[tokens[at]]
            at += len(node.edge)
            yield node

    def longest(self, asked: Tokens) -> Match | None:
        """Return an entry with the longest common prefix with ``asked``, or None if no entry shares a token."""
        node, at = self._root, 0
        while True:
            child = node.children.get(asked[at]) if at < len(asked) else None
            if child is None:
                break
            shared = shared_length(child.edge, asked[at : at + len(child.edge)])
            node, at = child, at + shared
            if shared < len(child.edge):
                break
        if not at:
            return None
        return Match(_any_entry(node), at)

    def longest_marked(self, asked: Tokens) -> Match | None:
        """Return the longest prefix of ``asked`` that is an entry or a marked length of one, or None."""
        node, at, best = self._root, 0, None
        while at < len(asked) and (child := node.children.get(asked[at])):
            if asked[at : at + len(child.edge)] != child.edge:
                break
            node, at = child, at + len(child.edge)
            if node.entry is not None or node.marked:
                best = Match(node.entry if node.entry is not None else min(node.marked), at)
        return best

    def beginnings(self, tokens: Tokens) -> list[int]:
        """Return the entries that are proper prefixes of ``tokens``. The tokens must be stored."""
        return [n.entry for n in self._path(tokens) if n.entry is not None and self._tokens[n.entry] != tokens]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences of one type."""
    most = min(len(a), len(b))
    equal = next((i for i in range(0, most, _BLOCK) if a[i : i + _BLOCK] != b[i : i + _BLOCK]), most)
    return next((i for i in range(equal, most) if a[i] != b[i]), most)


def _any_entry(node: _Node) -> int:
    """Return an entry at or below a node. Every leaf has one."""
    while node.entry is None:
        node = next(iter(node.children.values()))
    return node.entry


def _prune(parent: _Node, node: _Node) -> None:
    """Delete a node that has no entry, no marks and no children, or merge it with its only child."""
    if node.entry is not None or node.marked or len(node.children) > 1:
        return
    if not node.children:
        del parent.children[node.edge[0]]
        return
    (child,) = node.children.values()
    child.edge = node.edge + child.edge
    parent.children[node.edge[0]] = child
