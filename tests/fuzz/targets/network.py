"""Fuzz targets of announcements, and of addresses, layers and sizes as people and peers write them."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_interface
from typing import Any

from google.protobuf.message import DecodeError
from zeroconf.asyncio import AsyncServiceInfo

from cluster.client.proto_decoding import decode_accepted, decode_finish, decode_load_event
from cluster.codec.answer import decode_token
from cluster.codec.cluster_state import decode_cluster_state
from cluster.codec.examination import decode_examination
from cluster.codec.leadership import decode_leadership
from cluster.codec.plan import decode_joint_plan, decode_plan
from cluster.codec.request_trace import decode_trace
from cluster.codec.stored_models import decode_removal, decode_store
from cluster.core.errors import MacpipeError
from cluster.core.text import format_address, parse_address, parse_layers, parse_size
from cluster.discovery import txt_record as txt
from cluster.discovery.browse import read_sighting
from cluster.discovery.interfaces import Interface
from cluster.standby.replica_folder import ReplicaFolder
from cluster.v1 import cluster_pb2, inference_pb2, leader_pb2
from fuzz.mutation import spoil_bytes, spoil_proto
from fuzz.targets.kept import scratch
from fuzz.targets.target import Prepared, Target, prepare_message


def announcements() -> Prepared:
    """A TXT record with its port and addresses."""
    local = (Interface("en0", (ip_interface("10.0.0.5/24"),)),)
    said = txt.write(txt.Announcement("ab" * 8, "mac-1", "1", "home"))
    record = b"".join(bytes((len(pair),)) + pair for pair in (k + b"=" + v for k, v in said.items()))

    def run(data: bytes) -> None:
        addresses = [data[at : at + 4] for at in range(2, min(len(data), 10), 4) if len(data) >= at + 4]
        info = AsyncServiceInfo(
            txt.SERVICE, f"x.{txt.SERVICE}", int.from_bytes(data[:2], "big"), 0, 0, data[10:], addresses=addresses
        )
        found = read_sighting(info, local)
        if found:
            parse_address(found.address)
            assert found.name.isprintable()

    return Prepared(run, ((7000).to_bytes(2, "big") + bytes((10, 0, 0, 9, 127, 0, 0, 1)) + record,), spoil_bytes, ())


def updates() -> Prepared:
    """Store what a leader sends to its standby."""
    folder = scratch("home")
    replica = ReplicaFolder(folder, "lab")
    replica.__enter__()

    def store(update: leader_pb2.FollowResponse) -> None:
        replica.apply(update)
        decode_leadership(update.leadership)

    leader = cluster_pb2.Leadership.Coordinator(name="mac-1", instance="ab" * 8, addresses=["10.0.0.5:7700"])
    standby = cluster_pb2.Leadership.Standby(name="mac-2", in_sync=True)
    said = cluster_pb2.Leadership(role=cluster_pb2.Leadership.ROLE_LEADER, term=3, leader=leader, standbys=[standby])
    whole = leader_pb2.JournalPiece(content=b"macpipe journal 2\n", first=True, last=True)
    seeds = (
        leader_pb2.FollowResponse(number=1, leadership=said),
        *(leader_pb2.FollowResponse(number=2, file=file) for file in _state_files()),
        leader_pb2.FollowResponse(number=3, journal=whole),
        leader_pb2.FollowResponse(number=4, records=b"abc"),
        leader_pb2.FollowResponse(number=5, complete=leader_pb2.ReplicaComplete()),
    )
    return prepare_message(leader_pb2.FollowResponse, store, *seeds)


def _state_files() -> list[leader_pb2.ReplicatedFile]:
    contents = {"id": b"0123456789abcdef\n", "epoch": b"7", "service.json": b"{}", "keys.json": b"{}"}
    return [leader_pb2.ReplicatedFile(name=name, content=content) for name, content in contents.items()]


def _text(parse: Callable[[str], object], *seeds: str) -> Callable[[], Prepared]:
    return lambda: Prepared(
        lambda data: parse(data.decode("utf-8", "surrogateescape")), tuple(s.encode() for s in seeds), spoil_bytes
    )


def _address(text: str) -> None:
    host, port = parse_address(text)
    assert parse_address(format_address(host, port)) == (host, port)


def _size(text: str) -> None:
    assert parse_size(text, "--memory-limit") > 0


def replies() -> Prepared:
    """Read a coordinator's replies to its client."""

    def read_answer(answer: inference_pb2.GenerateResponse) -> None:
        for name, read in (("prompt", decode_accepted), ("token", decode_token), ("finish", decode_finish)):
            if answer.WhichOneof("event") == name:
                read(getattr(answer, name))

    readers: tuple[tuple[Any, Callable[[Any], object]], ...] = (
        (inference_pb2.GenerateResponse, read_answer),
        (cluster_pb2.LoadModelResponse, decode_load_event),
        (cluster_pb2.GetClusterResponse, decode_cluster_state),
        (cluster_pb2.PlanResponse, decode_plan),
        (cluster_pb2.PlanModelsResponse, decode_joint_plan),
        (inference_pb2.TraceResponse, decode_trace),
    )

    def run(data: bytes) -> None:
        """Read the bytes as each of the replies. Raises the last error if they are none of them."""
        refused: list[MacpipeError | DecodeError] = []
        for kind, read in readers:
            try:
                read(kind.FromString(data))
            except (MacpipeError, DecodeError) as error:
                refused.append(error)
        if len(refused) == len(readers):
            raise refused[-1]

    figures = inference_pb2.StageFigures(worker="a", start_layer=0, end_layer=2)
    ended = inference_pb2.FinishInfo(reason=inference_pb2.FINISH_REASON_STOP, stages=[figures])
    state = cluster_pb2.GetClusterResponse(
        cluster="c",
        workers=[cluster_pb2.Worker(id="i", name="n")],
        stages=[cluster_pb2.Stage(worker="n", start_layer=0, end_layer=2)],
        requests=[cluster_pb2.LiveRequest(request_id="r", stages=[figures])],
        events=[cluster_pb2.ClusterEvent(kind=cluster_pb2.EVENT_KIND_LOAD, sentence="loaded m")],
        activity="training adapters of m",
        training=cluster_pb2.TrainingProgress(iteration=1, iterations=2, seconds_left=3.0),
    )
    traced = inference_pb2.TraceResponse(
        request_id="r",
        epochs=[inference_pb2.TracedEpoch(epoch=1, stages=[inference_pb2.TracedStage(worker="n", end_layer=2)])],
        frames=[inference_pb2.TracedFrame(epoch=1, timings=[inference_pb2.TracedTiming(compute_us=9)], tokens=[1])],
    )
    planned = cluster_pb2.PlanModelsResponse(
        models=[
            cluster_pb2.PlannedModel(
                name="a", plan=cluster_pb2.PlanResponse(model="m", stages=[cluster_pb2.Stage(worker="n", end_layer=2)])
            )
        ],
        left_out=[cluster_pb2.UnplacedModel(name="b", why="it fits only when a is unloaded", unload=["a"])],
        memory=[
            cluster_pb2.MacMemory(
                worker="n",
                usable_bytes=9,
                models=[cluster_pb2.ModelMemory(name="a", weight_bytes=5, cache_bytes=4)],
            )
        ],
    )
    seeds = (
        traced,
        planned,
        inference_pb2.GenerateResponse(token=inference_pb2.TokenEvent(index=1, token=2, text="a", logprob=-0.5)),
        inference_pb2.GenerateResponse(finish=ended),
        cluster_pb2.LoadModelResponse(ready=state),
        state,
    )
    return Prepared(run, tuple(s.SerializeToString() for s in seeds), spoil_proto, (MacpipeError, DecodeError))


def examination() -> Prepared:
    """Read what a coordinator says of one Mac's examination."""
    finding = cluster_pb2.Finding(severity=cluster_pb2.FINDING_SEVERITY_NOTE, what="a VPN is connected", why="w")
    examined = cluster_pb2.MacExamination(mac="n", results=[cluster_pb2.CheckResult(check="VPN", findings=[finding])])
    return prepare_message(cluster_pb2.MacExamination, decode_examination, examined)


def store() -> Prepared:
    """Read what a coordinator says of the models on one Mac's disk."""
    model = cluster_pb2.StoredModel(
        fingerprint="ab" * 32, layers=[cluster_pb2.LayerSpan(start=0, end=2)], weight_bits=4
    )
    listed = cluster_pb2.MacStore(mac="n", folder="/models", models=[model])
    return prepare_message(cluster_pb2.MacStore, decode_store, listed)


def removal() -> Prepared:
    """Read what a coordinator says of a model that was to be removed."""
    kept = cluster_pb2.StoreRemoval(mac="n", model="m", problem="it is in use")
    return prepare_message(cluster_pb2.StoreRemoval, decode_removal, kept)


TARGETS = (
    Target("txt", 120, announcements),
    Target("address", 150, _text(_address, "mac-1.local:7000", "[fd00::5%en0]:7000", "10.0.0.5:65535")),
    Target("layers", 150, _text(parse_layers, "0-3,4-7", "0", " 0 - 1 , 2-3")),
    Target("size", 80, _text(_size, "24GiB", "1.5 T", "24000MiB", "7")),
    Target("reply", 50, replies),
    Target("update", 10, updates),
    Target("examination", 20, examination),
    Target("store", 20, store),
    Target("removal", 10, removal),
)
