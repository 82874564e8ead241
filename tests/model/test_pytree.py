"""The return values of layers, in every structure of mlx-lm's models."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from cluster.model.pytree import flatten, unflatten
from model.memory import settled_memory


class Pair(NamedTuple):
    hidden: mx.array
    keys: mx.array


@dataclass
class Blocks:
    partial: mx.array
    blocks: list[mx.array] = field(default_factory=list)
    count: int = 3


A, B, C = (mx.array([float(i)]) for i in range(3))


@pytest.mark.parametrize(
    ("value", "arrays"),
    [
        (A, [A]),
        ((A, B), [A, B]),
        ([A, (B, C)], [A, B, C]),
        ({"h": A, "extra": None, "n": 4}, [A]),
        (Pair(A, B), [A, B]),
        ((A, Blocks(B, [C])), [A, B, C]),
        ((A, None, "name", 1.5), [A]),
        (None, []),
    ],
)
def test_there_and_back(value: Any, arrays: list[mx.array]) -> None:
    template, found = flatten(value)
    assert [id(a) for a in found] == [id(a) for a in arrays]
    again = unflatten(template, list(found))
    assert type(again) is type(value)
    assert [id(a) for a in flatten(again)[1]] == [id(a) for a in arrays]


def test_the_value_and_the_template_stay_as_they_are() -> None:
    value = Blocks(A, [B])
    template, _ = flatten((value, C))
    assert (value.partial, value.blocks) == (A, [B])
    first, second = (unflatten(template, [x, None, None])[0] for x in (B, C))
    assert (first.partial, second.partial) == (B, C)
    assert first.count == 3


def test_what_did_not_cross_is_none() -> None:
    template, _ = flatten({"h": A, "seen": B})
    assert unflatten(template, [C, None]) == {"h": C, "seen": None}


def test_no_ring_of_references_holds_the_arrays() -> None:
    gc.collect()
    gc.disable()
    try:
        before = settled_memory()
        big = mx.zeros((1000,))
        mx.eval(big)
        template, arrays = flatten((big, [big]))
        unflatten(template, list(arrays))
        del big, arrays, template
        assert mx.get_active_memory() == before
    finally:
        gc.enable()
