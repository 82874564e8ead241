"""Prometheus metrics of one coordinator: of what it serves while it leads, of its copy while it stands by.

They are counts and latencies of requests, and gauges of the ring's state. They never hold any text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster import __version__
from cluster.coordinator.journal_writer import JournalWriter
from cluster.coordinator.loop_view import LoopView
from cluster.coordinator.request_timings import ClusterTotals
from cluster.core.cluster_state import DeploymentState, RequestState, ServingState
from cluster.core.errors import Aborted, MacpipeError
from cluster.core.leadership import CoordinatorName, CoordinatorRole, FollowingState, LeadershipState
from cluster.core.plan import Plan
from cluster.core.request import FinishEvent
from cluster.core.worker import WorkerState
from cluster.platform.process import resident_bytes
from cluster.scheduler.disk_prefixes import ReadOutcome

Values: TypeAlias = Iterable[tuple[list[str], float]]
"""Labels and values of one metric."""
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)


class ProcessMetrics:
    """The standard metrics of this process, which was ``started_at`` in seconds since 1970.

    The collector that comes with prometheus-client has them on Linux only.
    """

    def __init__(self, started_at: float) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ProcessCollector(started_at))

    def exposition(self) -> bytes:
        """Return them in Prometheus' text format. May block for milliseconds."""
        return generate_latest(self._registry)


class Metrics:
    """The metrics of a coordinator while it leads, over gRPC and HTTP. ``process`` has those of its process."""

    def __init__(self, process: ProcessMetrics | None = None) -> None:
        self.process = process or ProcessMetrics(time.time())
        # Nobody reads the "_created" series, which double the number of lines.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("macpipe_requests", "Finished requests, by outcome.", ["outcome"], registry=registry)
        self._tokens = Counter("macpipe_tokens", "Tokens of complete answers, by kind.", ["kind"], registry=registry)
        self._responses = Counter(
            "macpipe_http_responses", "HTTP responses, by route and status.", ["route", "status"], registry=registry
        )
        self._ttft = Histogram(
            "macpipe_time_to_first_token_seconds",
            "Time from acceptance to the first token.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "macpipe_time_per_output_token_seconds",
            "Mean time per output token of an answer.",
            buckets=_TPOT_S,
            registry=registry,
        )
        self._led: tuple[int, float] | None = None
        """The term of the last exposition, and when it began, in seconds since 1970."""

    def count_finished(self, event: FinishEvent) -> None:
        """Count a complete sample of an answer."""
        self._requests.labels(event.reason.value).inc()
        usage = event.usage
        if event.sample == 0:  # the prompt is processed once for all samples
            self._tokens.labels("prompt").inc(usage.prompt_tokens)
            self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        self._ttft.observe(event.ttft_ms / 1e3)
        if usage.completion_tokens > 1:
            self._tpot.observe(event.tpot_ms / 1e3)

    def count_error(self, error: MacpipeError) -> None:
        """Count a request that was rejected or failed."""
        self._requests.labels(error.reason.lower()).inc()

    def count_abandoned(self) -> None:
        """Count a request whose client disconnected."""
        self._requests.labels(Aborted.reason.lower()).inc()

    def count_response(self, route: str, status: int) -> None:
        """Count an HTTP response.

        ``route`` is the route's pattern, so that there are few labels. Status 0 means that the client had disconnected;
        it is counted as 499.
        """
        self._responses.labels(route, str(status or 499)).inc()

    def exposition(
        self,
        state: ServingState,
        plan: Plan | None,
        loop: LoopView | None,
        journal: JournalWriter | None = None,
        workers: Sequence[WorkerState] = (),
        totals: ClusterTotals | None = None,
        deployments: Sequence[DeploymentState] = (),
        leadership: LeadershipState | None = None,
    ) -> bytes:
        """Return all metrics in Prometheus' text format, with gauges of the given state.

        ``plan`` and ``loop`` are those of the default model; ``deployments`` are all models if there are several.
        ``leadership`` is None without standbys.
        """
        gauges = CollectorRegistry()
        gauges.register(_StateCollector(state, plan, loop, journal, workers, totals or ClusterTotals()))
        gauges.register(_ModelCollector(deployments))
        if leadership:
            gauges.register(_LeaderCollector(leadership, self._began_at(leadership)))
        return generate_latest(self._registry) + generate_latest(gauges)

    def _began_at(self, leadership: LeadershipState) -> float:
        """Return when the term began: the same until the next one, also if the clock is set."""
        if self._led is None or self._led[0] != leadership.term:
            self._led = leadership.term, time.time() - leadership.since_seconds
        return self._led[1]


def standby_exposition(following: FollowingState) -> bytes:
    """Return the metrics of a coordinator that stands by, in Prometheus' text format.

    What the leader tells of itself, its workers and its standbys is left out, so that no sum counts it twice.
    """
    gauges = CollectorRegistry()
    gauges.register(_StandbyCollector(following))
    return generate_latest(gauges)


class _StateCollector(Collector):
    """Collects the gauges of one state of the coordinator."""

    def __init__(
        self,
        state: ServingState,
        plan: Plan | None,
        loop: LoopView | None,
        journal: JournalWriter | None,
        workers: Sequence[WorkerState],
        totals: ClusterTotals,
    ) -> None:
        self._workers, self._totals = workers, totals
        self._state = state
        self._plan = plan
        self._loop = loop
        self._journal = journal

    def collect(self) -> Iterator[Metric]:
        yield _info()
        states = [([s.value], float(s is self._state)) for s in ServingState]
        yield _gauge("macpipe_state", "1 for the coordinator's current state.", ["state"], states)
        if self._journal:
            on = float(not self._journal.problem)
            yield _gauge("macpipe_journal_on", "1 while live requests are journaled to disk.", [], [([], on)])
        yield from self._counts()
        yield from self._machines()
        yield from self._disks()
        if self._plan and self._loop:
            yield from self._requests(self._loop)
            yield from self._guesses(self._loop)
            yield from self._stages(self._plan, self._loop)

    def _counts(self) -> Iterator[Metric]:
        totals = self._totals
        for name, text, value in (
            ("macpipe_generated_tokens", "Tokens of all answers, live ones included.", totals.tokens),
            ("macpipe_prompt_tokens", "Prompt tokens of requests that got a first token.", totals.prompt_tokens),
            ("macpipe_cached_prompt_tokens", "Of these, from a kept prefix.", totals.cached_tokens),
            ("macpipe_recoveries", "Losses of a stage that answers survived.", totals.recoveries),
        ):
            yield CounterMetricFamily(name, text, value=value)

    def _machines(self) -> Iterator[Metric]:
        """Yield what the workers said last of themselves, and whether they still answer."""
        labels = ["worker"]

        def by_worker(workers: Iterable[WorkerState], value: Callable[[WorkerState], float]) -> Values:
            return [([worker.name], float(value(worker))) for worker in workers]

        workers = list({worker.name: worker for worker in self._workers}.values())
        up = by_worker(workers, attrgetter("reachable"))
        yield _gauge("macpipe_worker_up", "1 while the worker answers its coordinator.", labels, up)
        used, most = (by_worker(workers, attrgetter(f"memory_{part}")) for part in ("used", "limit"))
        yield _gauge("macpipe_worker_memory_used_bytes", "Memory that the worker uses.", labels, used)
        yield _gauge("macpipe_worker_memory_limit_bytes", "Memory that the worker may use.", labels, most)
        powered = [worker for worker in workers if worker.power_watts or worker.energy_joules]
        watts, joules = (by_worker(powered, attrgetter(name)) for name in ("power_watts", "energy_joules"))
        yield _gauge("macpipe_worker_power_watts", "Power of the whole Mac, from macmon.", labels, watts)
        text = "Energy of the whole Mac since its worker started, from macmon."
        yield _counter("macpipe_worker_energy_joules", text, labels, joules)

    def _disks(self) -> Iterator[Metric]:
        """Yield what the workers have on their disks. Evictions are counted since the start of a worker's engine."""
        disks = [worker for worker in self._workers if worker.prefix_disk_limit]
        used = [([worker.name], float(worker.prefix_disk_bytes)) for worker in disks]
        yield _gauge("macpipe_prefix_disk_bytes", "Prefixes on a worker's disk.", ["worker"], used)
        evictions = CounterMetricFamily(
            "macpipe_prefix_disk_evictions", "Beginnings deleted from a worker's disk to make room.", labels=["worker"]
        )
        for worker in disks:
            evictions.add_metric([worker.name], worker.prefix_disk_evictions)
        yield evictions

    def _requests(self, loop: LoopView) -> Iterator[Metric]:
        states = [state for state in RequestState if state is not RequestState.UNKNOWN]
        phases = [([state.value], float(sum(r.state is state for r in loop.requests))) for state in states]
        yield _gauge("macpipe_requests_live", "Live requests, by phase.", ["phase"], phases)
        lanes = [([str(i)], float(size)) for i, size in enumerate(loop.lane_sizes)]
        yield _gauge("macpipe_lane_sequences", "Decoding sequences in each lane.", ["lane"], lanes)
        yield _gauge("macpipe_kept_prefixes", "Prefixes cached for later requests.", [], [([], float(loop.prefixes))])
        reads = CounterMetricFamily(
            "macpipe_prefix_disk_reads", "Prefixes read from the workers' disks, by outcome.", labels=["outcome"]
        )
        for outcome in ReadOutcome:
            reads.add_metric([outcome.value], loop.disk_reads.get(outcome, 0))
        yield reads
        tokens = "Prompt tokens that were read from the workers' disks."
        yield CounterMetricFamily("macpipe_prefix_disk_tokens", tokens, value=loop.disk_tokens)

    def _guesses(self, loop: LoopView) -> Iterator[Metric]:
        for name, text, count in (
            ("macpipe_guessed_tokens", "Tokens computed as guesses, by source.", attrgetter("guessed")),
            ("macpipe_accepted_tokens", "Guessed tokens that were right, by source.", attrgetter("accepted")),
            (
                "macpipe_voided_tokens",
                "Guessed tokens that were of no use, by source.",
                attrgetter("voided"),
            ),
            (
                "macpipe_guessed_rows",
                "Guessed tokens behind another token in one frame, by source.",
                attrgetter("rows"),
            ),
        ):
            yield _counter(name, text, ["source"], [([one.source], float(count(one))) for one in loop.guesses])

        window = max((request.window for request in loop.requests), default=1)
        text = "The most frames of one request that may be in flight at once; 1 without guesses."
        yield _gauge("macpipe_guess_window", text, [], [([], float(window))])
        text = "Times that there was no memory for the marks of guesses."
        yield CounterMetricFamily("macpipe_guesses_without_room", text, value=loop.guesses_without_room)

    def _stages(self, plan: Plan, loop: LoopView) -> Iterator[Metric]:
        stages = plan.pipeline  # the ranks of a group do the same

        def by_stage(values: Iterable[float]) -> list[tuple[list[str], float]]:
            return [([str(i), s.worker], v) for i, (s, v) in enumerate(zip(stages, values, strict=True))]

        def padded(values: Sequence[float]) -> list[float]:
            return [*values, *[0.0] * len(stages)][: len(stages)]

        labels = ["stage", "worker"]
        text = "Workers that share the stage's layers; 1 without a group. Its other series are rank 0's."
        yield _gauge("macpipe_stage_workers", text, labels, by_stage(float(s.spec.ranks) for s in stages))
        yield _gauge(
            "macpipe_kv_reserved_bytes", "KV cache reserved for live requests.", labels, by_stage(loop.reserved_bytes)
        )
        yield _gauge(
            "macpipe_kv_prefix_bytes", "KV cache held by cached prefixes.", labels, by_stage(loop.prefix_bytes)
        )
        room = by_stage(s.cache_bytes for s in stages)
        yield _gauge("macpipe_kv_capacity_bytes", "KV cache capacity.", labels, room)
        busy = by_stage(padded(loop.busy_s))
        yield _counter("macpipe_stage_compute_seconds", "Compute time of this epoch.", labels, busy)
        known = zip(stages, loop.bubbles, strict=True)
        bubbles = [([str(i), s.worker], idle) for i, (s, idle) in enumerate(known) if idle is not None]
        wasted = by_stage(padded(loop.wasted_s))
        text = "Compute time of wrong guesses since the last recovery."
        yield _counter("macpipe_wasted_compute_seconds", text, labels, wasted)
        yield _gauge(
            "macpipe_bubble_share",
            "Share of the ring's active time without compute in the last 30 s.",
            labels,
            bubbles,
        )


class _ModelCollector(Collector):
    """Collects the gauges of several models, by their names. They come from people, so there are few."""

    def __init__(self, deployments: Sequence[DeploymentState]) -> None:
        self._deployments = deployments

    def collect(self) -> Iterator[Metric]:
        if not self._deployments:
            return

        def by_model(value: Callable[[DeploymentState], float]) -> Values:
            return [([one.name], float(value(one))) for one in self._deployments]

        def prefixes(one: DeploymentState) -> float:
            return sum(replica.prefixes for replica in one.replicas)

        loaded, labels = by_model(lambda one: bool(one.replicas)), ["model"]
        yield _gauge("macpipe_model_loaded", "1 while the model is loaded.", labels, loaded)
        replicas = by_model(lambda one: len(one.replicas))
        yield _gauge("macpipe_model_replicas", "Copies of the model that answer requests.", labels, replicas)
        idle = by_model(attrgetter("idle_seconds"))
        yield _gauge("macpipe_model_idle_seconds", "Time since the model's last request ended.", labels, idle)
        yield _gauge("macpipe_model_kept_prefixes", "Prefixes cached for the model.", labels, by_model(prefixes))
        live = [
            ([one.name, state.value], float(sum(request.state is state for request in one.requests)))
            for one in self._deployments
            for state in RequestState
            if state is not RequestState.UNKNOWN
        ]
        yield _gauge("macpipe_model_requests_live", "The model's live requests, by phase.", ["model", "phase"], live)


class _LeaderCollector(Collector):
    """Collects the gauges of a leader, by a term that ``began_at`` a time, and of its standbys."""

    def __init__(self, leadership: LeadershipState, began_at: float) -> None:
        self._leadership, self._began_at = leadership, began_at

    def collect(self) -> Iterator[Metric]:
        state = self._leadership
        yield from _lead(state.role, state.term, state.leader)
        text = "When the leader's term began, in seconds since 1970."
        yield _gauge("macpipe_leader_since_timestamp_seconds", text, [], [([], self._began_at)])
        follows: Values = [([one.name], float(not one.away)) for one in state.standbys]
        text = "1 while the standby follows; 0 also for a coordinator that was lost, until it is back or removed."
        yield _gauge("macpipe_standby_follows", text, ["standby"], follows)
        in_sync: Values = [([one.name], float(one.in_sync)) for one in state.standbys]
        text = "1 while the standby has every record of live requests."
        yield _gauge("macpipe_standby_in_sync", text, ["standby"], in_sync)
        behind: Values = [([one.name], float(one.behind)) for one in state.standbys]
        yield _gauge("macpipe_standby_behind", "Updates that the standby has not stored yet.", ["standby"], behind)


class _StandbyCollector(Collector):
    """Collects the gauges of a coordinator that stands by."""

    def __init__(self, following: FollowingState) -> None:
        self._following = following

    def collect(self) -> Iterator[Metric]:
        state = self._following
        yield _info()
        yield from _lead(CoordinatorRole.STANDBY, state.term, state.leader)
        text = "1 while this coordinator stands by and follows the leader."
        yield _gauge("macpipe_follows_leader", text, [], [([], float(state.follows))])
        text = "1 while this coordinator follows and has every record of live requests, as the leader says."
        yield _gauge("macpipe_in_sync_with_leader", text, [], [([], float(state.in_sync))])


class _ProcessCollector(Collector):
    """Collects what the operating system says of this process, under the names that Prometheus recommends."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at

    def collect(self) -> Iterator[Metric]:
        text = "Start time of the process since unix epoch in seconds."
        yield _gauge("process_start_time_seconds", text, [], [([], self._started_at)])
        text = "Total user and system CPU time spent in seconds."
        yield CounterMetricFamily("process_cpu_seconds", text, value=time.process_time())
        if resident := resident_bytes(os.getpid()):
            yield _gauge("process_resident_memory_bytes", "Resident memory size in bytes.", [], [([], float(resident))])


def _info() -> Metric:
    return _gauge("macpipe_info", "The macpipe version.", ["version"], [([__version__], 1)])


def _lead(role: CoordinatorRole, term: int, leader: CoordinatorName | None) -> Iterator[Metric]:
    """Yield whether this coordinator leads, and who does as far as it knows."""
    leads = float(role is CoordinatorRole.LEADER)
    yield _gauge("macpipe_leader", "1 while this coordinator leads, 0 while it stands by.", [], [([], leads)])
    yield _gauge("macpipe_leader_term", "The term of the leader.", [], [([], float(term))])
    named: Values = [([leader.name], 1)] if leader else []
    yield _gauge("macpipe_leader_info", "The name of the coordinator that leads.", ["leader"], named)


def _counter(name: str, text: str, labels: list[str], values: Values) -> Metric:
    counter = CounterMetricFamily(name, text, labels=labels)
    for names, value in values:
        counter.add_metric(names, value)
    return counter


def _gauge(name: str, text: str, labels: list[str], values: Values) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for names, value in values:
        gauge.add_metric(names, value)
    return gauge
