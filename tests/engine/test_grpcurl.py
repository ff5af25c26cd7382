"""Every service, method and message of the daemon, called by grpcurl with reflection."""

from __future__ import annotations

import json
import re

import pytest

from tests.calls import IDLE, IMAGE, Caller, failure
from tests.engine.grpcurl import PACKAGE, Grpcurl, documents
from tests.rig import Daemon
from tests.rig.patience import limit

STANDARD = {
    "grpc.channelz.v1.Channelz",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


@pytest.fixture
def grpcurl(shared_daemon: Daemon) -> Grpcurl:
    """Grpcurl with the shared daemon."""
    return Grpcurl(shared_daemon)


def _services(grpcurl: Grpcurl) -> list[str]:
    return grpcurl.text("list").split()


def test_reflection_lists_and_describes_all_services_and_messages(grpcurl: Grpcurl) -> None:
    services = _services(grpcurl)
    assert {name for name in services if not name.startswith(PACKAGE)} == STANDARD
    assert {name.removeprefix(PACKAGE) for name in services if name.startswith(PACKAGE)} == {
        "ContainerService",
        "NodeService",
        "OperationService",
        "VolumeService",
    }
    described: set[str] = set()
    symbols = list(services)
    while symbols:
        symbol = symbols.pop()
        if symbol in described:
            continue
        described.add(symbol)
        description = grpcurl.text("describe", symbol)
        assert symbol in description
        symbols += re.findall(r"\.((?:gpudock|google|grpc)\.[A-Za-z0-9_.]+)", description)
    assert {
        PACKAGE + name for name in ("Container", "ContainerSpec", "Operation", "Gpu", "ExecContainerRequest")
    } <= described
    assert "CONTAINER_STATE_RUNNING" in grpcurl.text("describe", PACKAGE + "ContainerState")
    assert "GPU_EXHAUSTED" in grpcurl.text("describe", PACKAGE + "ErrorReason")


async def _call_volume_service(grpcurl: Grpcurl, caller: Caller) -> None:
    call = grpcurl.call
    named = {"name": "box"}
    (created,) = await call("VolumeService/CreateVolume", {"name": "box", "size_bytes": str(320 << 20)})
    assert created["volume"]["state"] == "VOLUME_STATE_READY"
    (got,) = await call("VolumeService/GetVolume", named)
    assert int(got["volume"]["used_bytes"]) < 320 << 20
    (listed,) = await call("VolumeService/ListVolumes", {"filter": {"owner": ""}})
    assert [volume["name"] for volume in listed["volumes"]] == ["box"]
    _watch(grpcurl, "VolumeService/WatchVolumes", "box")
    resized = await call("VolumeService/ResizeVolume", {**named, "size_bytes": str(330 << 20)})
    assert resized[-1]["result"]["size_bytes"] == str(330 << 20)
    (watched,) = (await call("OperationService/WatchOperation", {"id": resized[0]["operation"]["id"]}))[-1:]
    assert watched["result"]["volume"]["name"] == "box"
    (history,) = await call("VolumeService/ListVolumeRevisions", named)
    assert [revision["cause"] for revision in history["revisions"]] == [
        "VOLUME_REVISION_CAUSE_CREATED",
        "VOLUME_REVISION_CAUSE_GROWN",
    ]
    await call("VolumeService/DeleteVolume", named)
    assert (await failure(caller.volume("box"))).reason == "VOLUME_NOT_FOUND"
    adopt = json.dumps({"name": "adopted", "engine_volume": "missing"})
    refused = grpcurl.run(PACKAGE + "VolumeService/AdoptVolume", flags=("-d", adopt))
    assert "VOLUME_NOT_FOUND" in refused.stderr, refused.stderr
    grpcurl.called.add("VolumeService/AdoptVolume")


@pytest.mark.deep
async def test_grpcurl_can_call_every_method(grpcurl: Grpcurl, caller: Caller) -> None:
    call = grpcurl.call
    spec = {"image": IMAGE, "command": list(IDLE), "gpus": {"count": 1}, "ports": [{"container_port": 80}]}
    created = await call("ContainerService/CreateContainer", {"name": "box", "spec": spec})
    assert created[-1]["result"]["status"]["state"] == "CONTAINER_STATE_RUNNING"
    operation = created[0]["operation"]["id"]
    named = {"name": "box"}

    (got,) = await call("ContainerService/GetContainer", named)
    assert got["container"]["spec"]["image"] == IMAGE
    (listed,) = await call("ContainerService/ListContainers", {"filter": {"states": ["CONTAINER_STATE_RUNNING"]}})
    assert [container["name"] for container in listed["containers"]] == ["box"]

    _watch(grpcurl, "ContainerService/WatchContainers", "box")

    start = {"container": "box", "command": ["sh", "-c", "echo out; echo err >&2; exit 3"]}
    messages = await call("ContainerService/ExecContainer", {"start": start})
    assert "started" in messages[0]
    assert [message["stdout"] for message in messages if "stdout" in message] == ["b3V0Cg=="]
    assert [message["stderr"] for message in messages if "stderr" in message] == ["ZXJyCg=="]
    assert messages[-1]["exited"]["code"] == 3

    scaled = await call("ContainerService/ScaleContainer", {**named, "gpus": {"count": 2}})
    assert len(scaled[-1]["result"]["status"]["gpu_uuids"]) == 2
    await _call_revision_methods(grpcurl, "box")
    (paused,) = await call("ContainerService/PauseContainer", named)
    assert paused["container"]["status"]["state"] == "CONTAINER_STATE_PAUSED"
    (unpaused,) = await call("ContainerService/UnpauseContainer", named)
    assert unpaused["container"]["status"]["state"] == "CONTAINER_STATE_RUNNING"
    restarted = await call("ContainerService/RestartContainer", named)
    assert restarted[-1]["result"]["status"]["state"] == "CONTAINER_STATE_RUNNING"

    await _call_node_service(grpcurl)

    (read,) = await call("OperationService/GetOperation", {"id": operation})
    assert read["operation"]["state"] == "OPERATION_STATE_SUCCEEDED"
    (operations,) = await call("OperationService/ListOperations", {"filter": {"target": named}})
    assert operation in {listed_operation["id"] for listed_operation in operations["operations"]}
    watched = await call("OperationService/WatchOperation", {"id": operation})
    assert "result" in watched[-1]
    refused = grpcurl.run(PACKAGE + "OperationService/CancelOperation", flags=("-d", json.dumps({"id": operation})))
    assert "FailedPrecondition" in refused.stderr
    assert "OPERATION_NOT_CANCELLABLE" in refused.stderr, "grpcurl does not show the details"
    grpcurl.called.add("OperationService/CancelOperation")

    (stopped,) = await call("ContainerService/StopContainer", {**named, "timeout": "1s"})
    assert stopped["container"]["status"]["state"] == "CONTAINER_STATE_STOPPED"
    started = await call("ContainerService/StartContainer", {**named, "gpus": {"count": 0}})
    assert started[-1]["result"]["status"]["state"] == "CONTAINER_STATE_RUNNING"
    await call("ContainerService/DeleteContainer", {**named, "force": True})
    assert await caller.free_gpus() == 8
    await _call_volume_service(grpcurl, caller)

    methods = {
        method.removeprefix(PACKAGE).replace("Service.", "Service/")
        for service in _services(grpcurl)
        if service.startswith(PACKAGE)
        for method in grpcurl.text("list", service).split()
    }
    assert methods == grpcurl.called, "this test does not call every method of the contract"


async def _call_node_service(grpcurl: Grpcurl) -> None:
    call = grpcurl.call
    (node,) = await call("NodeService/GetNode")
    assert node["node"]["claimed_gpus"] == 2
    (gpus,) = await call("NodeService/ListGpus", {"filter": {"container": "box"}})
    assert len(gpus["gpus"]) == 2
    (drift,) = await call("NodeService/ListDrift", {"filter": {"container": "box"}})
    assert drift["drift"] == []
    (ports,) = await call("NodeService/ListPorts")
    assert ports["ports"][0]["container"] == "box"


async def _call_revision_methods(grpcurl: Grpcurl, name: str) -> None:
    call, named = grpcurl.call, {"name": name}
    assert (
        "result" in (await call("ContainerService/CommitContainer", {**named, "repository": "gpudock/committed"}))[-1]
    )
    updated = await call("ContainerService/UpdateContainer", {**named, "spec": {"env": {"A": "1"}}})
    assert updated[-1]["result"]["spec"]["env"] == {"A": "1"}
    rolled_back = await call("ContainerService/RollbackContainer", {**named, "revision": 2})
    assert rolled_back[-1]["result"]["spec"]["env"] == {}
    clone = await call("ContainerService/CloneContainer", {"name": f"{name}-clone", "source": name, "revision": 3})
    assert clone[-1]["result"]["spec"]["env"] == {"A": "1"}
    await call("ContainerService/DeleteContainer", {"name": f"{name}-clone", "force": True})
    (revisions,) = await call("ContainerService/ListContainerRevisions", named)
    causes = ["CREATED", "SCALED", "UPDATED", "ROLLED_BACK"]
    assert [listed["cause"] for listed in revisions["revisions"]] == [f"REVISION_CAUSE_{cause}" for cause in causes]
    (revision,) = await call("ContainerService/GetContainerRevision", {**named, "revision": 3})
    assert revision["revision"]["snapshot"]["kind"] == "SNAPSHOT_KIND_TREE"
    await call("ContainerService/DeleteContainerRevision", {**named, "revision": 1})


def _watch(grpcurl: Grpcurl, method: str, name: str) -> None:
    # A watch never ends by itself, so that the call has a deadline.
    following = grpcurl.run(PACKAGE + method, flags=("-max-time", f"{limit(1.5):.1f}", "-emit-defaults"))
    grpcurl.called.add(method)
    assert "DeadlineExceeded" in following.stderr
    events = documents(following.stdout)
    checkpoint = next(number for number, event in enumerate(events) if "checkpoint" in event)
    assert [event["added"]["name"] for event in events[:checkpoint]] == [name]
    assert events[checkpoint]["checkpoint"] == {"list_complete": True}
    assert all(event["resume_token"] for event in events)


def test_grpcurl_shows_the_fields_of_an_invalid_request(grpcurl: Grpcurl) -> None:
    request = {"name": "Not A Name", "spec": {"image": "", "cpus": -1}}
    completed = grpcurl.run(PACKAGE + "ContainerService/CreateContainer", flags=("-d", json.dumps(request)))
    assert "InvalidArgument" in completed.stderr
    for field in ("name", "spec.image", "spec.cpus"):
        assert f'"field":"{field}"' in completed.stderr, completed.stderr
