"""``macpipe store list|rm --everywhere`` from the outside: a table for all Macs, and exit codes."""

from __future__ import annotations

import json
import time
from typing import Any

from client.scripted import Coordinator
from cluster.v1 import cluster_pb2 as pb

Macpipe = Any
FINGERPRINT = "ab" * 32


def stored(start: int, end: int, **more: Any) -> pb.StoredModel:
    return pb.StoredModel(
        fingerprint=FINGERPRINT,
        disk_bytes=9 << 30,
        model_bytes=18 << 30,
        layers=[pb.LayerSpan(start=start, end=end)],
        last_used=time.time() - 7200,
        **more,
    )


def test_list_everywhere_says_which_layers_are_where(macpipe: Macpipe, coordinator: Coordinator) -> None:
    first = stored(0, 32, names=["mlx-community/Qwen3-32B-4bit"], in_use=True)
    copy = pb.StoredModel(fingerprint="cd" * 32, names=["faq"], weight_bits=4, disk_bytes=668 << 10,
                          model_bytes=548 << 10, in_use=True)  # fmt: skip
    coordinator.script.stores = [
        pb.MacStore(mac="mac-1", models=[first, copy]),
        pb.MacStore(mac="mac-2", models=[stored(32, 64)], omitted=2),
    ]
    done = macpipe("store", "list", "--everywhere", to=coordinator)
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["mlx-community/Qwen3-32B-4bit", "mac-1", "0-31", "9", "of", "18", "GiB", "in", "use"] in rows
    assert ["mac-2", "32-63", "9", "of", "18", "GiB", "2", "h", "0", "min", "ago"] in rows
    assert ["faq,", "4", "bits", "mac-1", "none", "668.0", "KiB", "in", "use"] in rows
    assert rows[-1] == ["2", "models", "on", "2", "Macs"]
    assert done.stderr == "mac-2 has 2 more models; see `macpipe store list` there\n"
    coordinator.script.stores.append(pb.MacStore(mac="mac-3", problem="mac-3 does not answer"))
    partial = macpipe("store", "list", "--everywhere", "--json", to=coordinator)
    assert partial.returncode == 1
    assert [(one["mac"], one["problem"]) for one in json.loads(partial.stdout)["stores"]] == [
        ("mac-1", ""),
        ("mac-2", ""),
        ("mac-3", "mac-3 does not answer"),
    ]


def test_rm_everywhere_says_who_kept_a_model(macpipe: Macpipe, coordinator: Coordinator) -> None:
    coordinator.script.removals = [pb.StoreRemoval(mac="mac-1", model="o/a", freed_bytes=9 << 30)]
    done = macpipe("store", "rm", "o/a", "--everywhere", to=coordinator)
    assert (done.returncode, done.stdout, done.stderr) == (0, "removed o/a on mac-1 (9.0 GiB)\n", "")
    assert list(coordinator.script.seen[-1].models) == ["o/a"]
    coordinator.script.removals += [
        pb.StoreRemoval(mac="mac-2", model="o/a", problem="the disk is read-only"),
        pb.StoreRemoval(mac="mac-3", problem="mac-3 does not answer"),
    ]
    partial = macpipe("store", "rm", "o/a", "--everywhere", to=coordinator)
    assert partial.returncode == 1
    assert partial.stdout == done.stdout
    assert partial.stderr.splitlines() == [
        "kept o/a on mac-2: the disk is read-only",
        "mac-3 keeps what it has: mac-3 does not answer",
    ]


def test_options_of_one_mac_and_of_all_do_not_mix(macpipe: Macpipe) -> None:
    mixed = macpipe("store", "list", "--everywhere", "--home", "x")
    assert (mixed.returncode, "--home is for this Mac's store" in mixed.stderr) == (2, True)
    alone = macpipe("store", "rm", "o/a", "--coordinator", "127.0.0.1:1")
    assert (alone.returncode, "--coordinator needs --everywhere" in alone.stderr) == (2, True)
