"""The dashboard's queries and the alert rules in a real Prometheus that scrapes a live cluster."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.client import Client
from integration.daemons import Cluster, free_port, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

GRAFANA = Path(__file__).parents[2] / "ops" / "grafana"
WITHOUT_DATA = {"Power", "Energy per token", "Guesses", "Prefixes on disk", "Leader"}
"""Panels of what this cluster has not: macmon, guesses, a folder for prefixes, and standbys."""
OF_SEVERAL_MODELS = "macpipe_model_"
"""How the series begin that only a cluster of several models has."""
REQUESTS = 3


@pytest.fixture
def prometheus(cluster: Cluster, llama: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes a cluster of two workers, which has answered some requests."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed; Debian has it as a package")
    for name in ("one", "two"):
        cluster.worker(name)
    http = f"127.0.0.1:{free_port()}"
    _, address = cluster.serving(llama, 2, "--http", http)
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(GRAFANA / "alerts.yml")],
        "scrape_configs": [{"job_name": "macpipe", "static_configs": [{"targets": [http]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
    own = f"127.0.0.1:{free_port()}"
    files = (f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}")
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program, *files, f"--web.listen-address={own}"], stdout=log, stderr=log)
    try:
        url = f"http://{own}/api/v1"
        until(lambda: [target for target in get(url, "targets")["activeTargets"] if target["health"] == "up"])
        with Client(address, timeout_s=60) as client:
            for _ in range(REQUESTS):
                client.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
        finished = "sum(macpipe_requests_total) >= " + str(REQUESTS)
        until(lambda: get(url, "query", query=finished)["result"])
        until(lambda: get(url, "query", query="count_over_time(macpipe_info[1m]) >= 5")["result"])
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def get(url: str, path: str, **query: str) -> Any:
    """Ask Prometheus, and return the data of its answer; nothing while it is starting."""
    try:
        with urllib.request.urlopen(f"{url}/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:  # noqa: S310
            told = json.load(answer)
    except OSError as e:
        if isinstance(e, urllib.error.HTTPError) and e.code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise AssertionError(e.read().decode()) from None
        return {"activeTargets": [], "result": []}
    assert told["status"] == "success"
    return told["data"]


def test_every_panel_has_data_and_no_alert_fires(prometheus: str) -> None:
    dashboard = json.loads((GRAFANA / "macpipe.json").read_text(encoding="utf-8"))
    empty = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            found = get(prometheus, "query", query=query)["result"]
            if not found and OF_SEVERAL_MODELS not in query:
                empty.add(panel["title"])
    assert empty <= WITHOUT_DATA
    (group,) = get(prometheus, "rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert {rule["state"] for rule in group["rules"]} == {"inactive"}
