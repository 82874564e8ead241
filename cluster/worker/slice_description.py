"""Describe the slices of a worker from its engines' reports, and why the worker cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.plan import LayerRange
from cluster.core.worker import HeldSlice
from cluster.worker.engine_slots import SlotReport


def describe_slices(reports: Sequence[SlotReport]) -> tuple[HeldSlice, ...]:
    """Describe the slices of the engines that hold one."""
    return tuple(_describe_slice(report) for report in reports if report.slot.held)


def find_problem(reports: Sequence[SlotReport]) -> str:
    """Return why the worker cannot be used; "" if the first engine answers, or another one that has or loads a slice.

    What is wrong with one engine of several is a problem of its slice alone.
    """
    first, *further = reports
    return "" if any(report.slot.requests and not report.problem for report in further) else first.problem


def _describe_slice(answer: SlotReport) -> HeldSlice:
    held, report, supervisor = answer.slot.held, answer.report, answer.slot.supervisor
    assert held
    return HeldSlice(
        epoch=held.epoch,
        layers=LayerRange(held.start_layer, held.end_layer),
        model=held.model,
        fingerprint=held.fingerprint,
        kv_bits=held.kv_bits,
        weight_bits=held.weight_bits,
        adapters=report.adapters,
        data_port=supervisor.hello.port if supervisor.hello else 0,
        sequences=report.sequences,
        busy_ms=report.busy_ms,
        computing=supervisor.computing,
        problem=answer.problem,
        memory_used=report.memory_used,
        memory_limit=held.memory_limit,
        ranks=max(held.ranks, 1),
    )
