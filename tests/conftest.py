"""Shared by all tests: the seed, the option for long tests, and the fixtures of namespaces and small disks."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import cluster.model  # noqa: F401  # first, so that mlx-lm does not lower the limit of files for all that tests start
from effort import LEAST, SAMPLE, WHOLE
from quick import NOT_QUICK

TESTS = Path(__file__).resolve().parent
MANY_OBJECTS = 50_000
"""A garbage collection looks at a million of them in a second."""
pytest_plugins = ["closed_loops", "netns", "disks", "limits"]


os.environ.pop("COLUMNS", None)  # a pipe's width, for what the tests print and for the daemons that they start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out the files of NOT_QUICK: those that start daemons or load models"
    )
    parser.addoption("--all", action="store_true", help="run the tests marked long, too")
    parser.addoption("--mtls", action="store_true", help="give the clusters of real daemons certificates")
    parser.addoption("--seed", type=int, default=None, help="the run's randomness; 0, and anew each time with --all")


def pytest_configure(config: pytest.Config) -> None:
    """Derive the same examples from the same tree in each default run; --all looks for new ones."""
    # How long an example takes depends on what else this machine does, so it decides nothing.
    settings.register_profile(WHOLE, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile(SAMPLE, settings.get_profile(WHOLE), derandomize=True)
    settings.register_profile(LEAST, settings.get_profile(SAMPLE), max_examples=25)
    settings.load_profile(WHOLE if config.option.all else LEAST if config.option.quick else SAMPLE)
    # The processes of xdist are given this process's options, so they share its seed.
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**32) if config.option.all else 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick, leave out the files of NOT_QUICK: they are not even imported."""
    if not config.option.quick or not collection_path.is_relative_to(TESTS):
        return None
    return True if collection_path.relative_to(TESTS).as_posix() in NOT_QUICK else None


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (again with --seed {config.option.seed})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.all:
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: runs with --all"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without garbage collections, and keep them out of later ones: each would take half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        keep_from_collections()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file's tests, keep what they imported and what outlives them out of later garbage collections."""
    if nextitem and nextitem.path != item.path and len(gc.get_objects(generation=2)) > MANY_OBJECTS:
        keep_from_collections()


def keep_from_collections() -> None:
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("MACPIPE_CHECKS") == "failed":
        terminalreporter.write_line("ops/check FAILED: its complaints are above the tests", red=True)


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """Keep the state of daemons out of the folder where a person keeps theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACPIPE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MACPIPE_CLUSTER", raising=False)
        if pytestconfig.option.mtls:
            patch.setenv("MACPIPE_TEST_MTLS", "1")  # what ``parties.mtls`` reads
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The loop of tests marked ``anyio``."""
    return "asyncio"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness of this test's own, from the run's seed; the seed stands beside the failure."""
    seed = request.config.option.seed
    print(f"seed: {seed}")
    return random.Random(f"{seed} {request.node.nodeid}")
