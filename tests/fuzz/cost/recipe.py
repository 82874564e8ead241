"""Recipes: descriptions of large inputs in a few words, so that they can be stored, printed on a line, and mutated.

A recipe is JSON: a text (UTF-8), or a list whose first item names the node:

- ``["cat", a, b, ...]``: one after another;
- ``["rep", n, a]``: ``a``, n times;
- ``["each", n, before, after]``: ``before``, the number in hexadecimal, ``after``, for each of n numbers;
- ``["nest", n, open, a, close]``: ``a`` inside n pairs;
- ``["hex", digits]``: bytes;
- ``["msg", number, a]``: the protobuf field ``number`` that holds ``a`` behind its length;
- ``["int", number, value]``: the protobuf field ``number`` as a varint;
- ``["ints", n, number, inner]``: n times the field ``number``, each a message whose field ``inner`` is another number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Final, TypeAlias

Recipe: TypeAlias = "str | list[Any]"
COUNTED: Final = frozenset({"rep", "each", "nest", "ints"})
"""Nodes whose second item is a count."""
MAX_NODES: Final = 64
"""A recipe with more is not made worse any further: nobody could read it."""
MAX_SHOWN: Final = 80
FACTORS: Final = (0.1, 0.5, 0.9, 1.1, 2, 3, 10, 100)


def build(recipe: Recipe) -> bytes:
    """The input. Look at ``size`` first: this takes whatever memory the input needs."""
    if isinstance(recipe, str):
        return recipe.encode("utf-8", "surrogatepass")
    kind, *rest = recipe
    match kind:
        case "cat":
            return b"".join(map(build, rest))
        case "rep":
            return build(rest[1]) * rest[0] if rest[0] else b""
        case "each":
            before, after = build(rest[1]), build(rest[2])
            return b"".join(b"%b%x%b" % (before, number, after) for number in range(rest[0]))
        case "nest":
            return build(rest[1]) * rest[0] + build(rest[2]) + build(rest[3]) * rest[0]
        case "hex":
            return bytes.fromhex(rest[0])
        case "msg":
            inner = build(rest[1])
            return varint(rest[0] << 3 | 2) + varint(len(inner)) + inner
        case "int":
            return varint(rest[0] << 3) + varint(rest[1])
        case "ints":
            inners = (varint(rest[2] << 3) + varint(number) for number in range(rest[0]))
            tag = varint(rest[1] << 3 | 2)
            return b"".join(tag + varint(len(inner)) + inner for inner in inners)
    raise ValueError(f"no node of a recipe is called {kind!r}")


def size(recipe: Recipe) -> int:
    """Bytes of what ``build`` would make, at most, and within a few per cent."""
    if isinstance(recipe, str):
        return len(recipe.encode("utf-8", "surrogatepass"))
    kind, *rest = recipe
    match kind:
        case "cat":
            return sum(map(size, rest))
        case "rep":
            return int(rest[0] * size(rest[1]))
        case "each":
            return int(rest[0] * (size(rest[1]) + size(rest[2])) + _digits(rest[0]))
        case "nest":
            return int(rest[0] * (size(rest[1]) + size(rest[3])) + size(rest[2]))
        case "hex":
            return len(rest[0]) // 2
        case "msg":
            return size(rest[1]) + 10
        case "int":
            return 15
        case "ints":
            return int(rest[0] * (3 + len(varint(rest[0]))))
    raise ValueError(f"no node of a recipe is called {kind!r}")


def _digits(count: int) -> int:
    """Hexadecimal digits of the numbers below ``count``, all together."""
    total, below, width = 0, 0, 1
    while below < count:
        end = min(count, 16**width)
        total, below, width = total + (end - below) * width, end, width + 1
    return total


def varint(value: int) -> bytes:
    """Encode a number as a protobuf varint."""
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes((*made, value))


def filled(recipe: Recipe, limit: int) -> Recipe:
    """The recipe with its counts scaled so that the input comes close to ``limit`` bytes, and never above it."""
    made = json.loads(json.dumps(recipe))
    for _ in range(40):
        now = size(made)
        if 0.97 * limit <= now <= limit:
            break
        counts = [node for node in nodes(made) if isinstance(node, list) and node[0] in COUNTED]
        if not counts:
            break
        largest = max(counts, key=_weight)
        wanted = limit * 0.99 / max(1, now)
        count = int(largest[1] * wanted) if wanted < 1 or largest[1] > 64 else max(largest[1] + 1, largest[1] * 2)
        if count == largest[1]:
            break
        largest[1] = min(max(1, count), limit)  # what is repeated may be nothing
    return made if size(made) <= limit else ""


def _weight(node: list[Any]) -> tuple[int, int]:
    return size(node), node[1]


def nodes(recipe: Recipe) -> Iterator[Recipe]:
    """Every node, the outermost first."""
    yield recipe
    if isinstance(recipe, list):
        for part in recipe[1:]:
            if isinstance(part, str | list) and recipe[0] != "hex":
                yield from nodes(part)


def shown(recipe: Recipe) -> str:
    """A line for people, at most ``MAX_SHOWN`` characters."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in _shown(recipe))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 25]}...{text[-22:]}"


def _shown(recipe: Recipe) -> str:
    if isinstance(recipe, str):
        return recipe if len(recipe) <= MAX_SHOWN else f"{recipe[:30]}...{recipe[-15:]}"
    kind, *rest = recipe
    match kind:
        case "cat":
            return "".join(map(_shown, rest))
        case "rep":
            return f"({_shown(rest[1])})x{rest[0]}"
        case "each":
            return f"({_shown(rest[1])}#{_shown(rest[2])})x{rest[0]}"
        case "nest":
            return f"({_shown(rest[1])})x{rest[0]}{_shown(rest[2])}({_shown(rest[3])})x{rest[0]}"
        case "hex":
            return f"<{rest[0][:24]}>"
        case "msg":
            return f"{rest[0]}:{{{_shown(rest[1])}}}"
        case "int":
            return f"{rest[0]}={rest[1]} "
        case _:
            return f"({rest[1]}:{{{rest[2]}=#}})x{rest[0]}"


def worsened(recipe: Recipe, rng: Random, others: Sequence[Recipe], atoms: Sequence[Recipe]) -> Recipe:
    """Another recipe: one to three changes of counts, texts and structure, with parts of ``others`` and ``atoms``."""
    made: Recipe = json.loads(json.dumps(recipe))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(made))
        if not places or len(places) > MAX_NODES:
            return _wrapped(made, rng)
        holder, at = rng.choice(places)
        changed = _changed(holder[at], rng, others, atoms)
        holder[at] = json.loads(json.dumps(changed))  # a copy: what was lent may be changed next
    return made


def _places(recipe: Recipe) -> Iterator[tuple[list[Any], int]]:
    if isinstance(recipe, list) and recipe[0] != "hex":
        for at, part in enumerate(recipe[1:], 1):
            if isinstance(part, str | list):
                yield recipe, at
                yield from _places(part)


def _changed(node: Recipe, rng: Random, others: Sequence[Recipe], atoms: Sequence[Recipe]) -> Recipe:
    match rng.randrange(6):
        case 0 | 1 if isinstance(node, list) and node[0] in COUNTED:
            return [node[0], max(1, round(node[1] * rng.choice(FACTORS))), *node[2:]]
        case 2 if atoms:
            return rng.choice(atoms)
        case 3 if others:
            return rng.choice(list(nodes(rng.choice(others))))
        case 4 if atoms:
            return ["cat", node, rng.choice(atoms)] if rng.random() < 0.5 else ["cat", rng.choice(atoms), node]
        case _:
            return _wrapped(node, rng)


def _wrapped(node: Recipe, rng: Random) -> Recipe:
    count = rng.choice((2, 10, 100, 1000))
    if rng.random() < 0.7:
        return ["rep", count, node]
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}"), ("(", ")"), ('[{"a":', "}]")))
    return ["nest", count, opened, node, closed]
