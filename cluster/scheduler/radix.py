"""A radix tree over token ids. It finds the kept prefix that has the longest common prefix with a prompt.

It knows sequences of integers and the ids they are stored under, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(slots=True)
class _Node:
    """A node of the tree. ``edge``: the tokens from its parent to here; ``entry``: the id that ends here, if any."""

    edge: Tokens = ()
    entry: int | None = None
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """An entry, and the length of its common prefix with the query. ``whole``: the entry has no further tokens."""

    entry: int
    length: int
    whole: bool


class RadixTree:
    """Entry ids by token sequence. Each token sequence has at most one entry."""

    def __init__(self) -> None:
        self._root = _Node()
        self._tokens: dict[int, Tokens] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, entry: int) -> Tokens:
        return self._tokens[entry]

    def insert(self, tokens: Tokens, entry: int) -> int | None:
        """Store an entry. Return the id of the entry with the same tokens that it replaces, or None."""
        node, rest = self._root, tokens
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                child = node.children[rest[0]] = _Node(rest)
            shared = _shared_length(child.edge, rest)
            if shared < len(child.edge):
                child = self._split(node, child, shared)
            node, rest = child, rest[shared:]
        replaced, node.entry = node.entry, entry
        if replaced is not None:
            del self._tokens[replaced]
        self._tokens[entry] = tokens
        return replaced

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
            shared = _shared_length(child.edge, asked[at:])
            node, at = child, at + shared
            if shared < len(child.edge):
                break
        if not at:
            return None
        entry = _any_entry(node)
        return Match(entry, at, len(self._tokens[entry]) == at)

    def longest_whole(self, asked: Tokens) -> Match | None:
        """Return the longest entry that is a prefix of ``asked``, or None."""
        node, at, best = self._root, 0, None
        while at < len(asked) and (child := node.children.get(asked[at])):
            if asked[at : at + len(child.edge)] != child.edge:
                break
            node, at = child, at + len(child.edge)
            if node.entry is not None:
                best = Match(node.entry, at, True)
        return best

    def beginnings(self, tokens: Tokens) -> list[int]:
        """Return the entries that are proper prefixes of ``tokens``. The tokens must be stored."""
        return [n.entry for n in self._path(tokens) if n.entry is not None and self._tokens[n.entry] != tokens]


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


def _any_entry(node: _Node) -> int:
    """Return an entry at or below a node. Every leaf has one."""
    while node.entry is None:
        node = next(iter(node.children.values()))
    return node.entry


def _prune(parent: _Node, node: _Node) -> None:
    """Delete a node that has no entry and no children, or merge it with its only child."""
    if node.entry is not None or len(node.children) > 1:
        return
    if not node.children:
        del parent.children[node.edge[0]]
        return
    (child,) = node.children.values()
    child.edge = node.edge + child.edge
    parent.children[node.edge[0]] = child
