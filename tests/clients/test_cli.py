"""The command: its requests, output and exit codes."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from google.protobuf.duration_pb2 import Duration
from gpudock import CommittedImage
from gpudock.cli import main
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import gpu_pb2, node_service_pb2, operation_pb2, operation_service_pb2, volume_service_pb2
from gpudock.v1.container_pb2 import (
    RESTART_POLICY_KIND_ON_FAILURE,
    SNAPSHOT_POLICY_NEVER,
    Mount,
    RestartPolicy,
    TmpfsMount,
)
from gpudock.v1.container_revision_pb2 import (
    REVISION_CAUSE_CREATED,
    REVISION_CAUSE_ROLLED_BACK,
    SNAPSHOT_KIND_TREE,
    ContainerRevision,
)
from gpudock.v1.node_pb2 import Node
from gpudock.v1.port_claim_pb2 import PortClaim
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP
from gpudock.v1.watch_pb2 import WatchCheckpoint

from tests.clients import messages
from tests.clients.command import DEADLINE, run, spawn
from tests.clients.scripted_server import Context, ScriptedServer, abort, error_reply, reply_with
from tests.rig.patience import limit

Created = pb.CreateContainerResponse


STAGES = [
    messages.stage("pull-image", messages.SUCCEEDED, current_bytes=3 * 2**20, total_bytes=3 * 2**20),
    messages.stage("create", messages.SUCCEEDED, seconds=0.25),
    messages.stage("start", messages.SUCCEEDED),
]


async def created(_: Any, __: Context) -> AsyncIterator[Created]:
    yield Created(operation=messages.operation(STAGES[0], messages.stage("create", messages.RUNNING)))
    yield Created(operation=messages.operation(*STAGES, state=operation_pb2.OPERATION_STATE_SUCCEEDED))
    yield Created(result=messages.container())


async def changes(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
    yield messages.watch_event("t1", added=messages.container())
    yield messages.watch_event("t2", checkpoint=WatchCheckpoint(list_complete=True))
    yield messages.watch_event("t3", deleted=messages.container())
    await abort(context, grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")


async def test_a_watch_prints_a_line_for_each_event(server: ScriptedServer) -> None:
    server.on("WatchContainers", changes)
    ended = await run(server.address, "watch", "--state", "running", "--resume-token", "t0", "--changes-only")
    assert ended.code == 1
    assert "RESUME_TOKEN_EXPIRED" in ended.err
    header, *lines = ended.out.splitlines()
    assert header.split()[:4] == ["TIME", "EVENT", "NAME", "STATE"]
    name = messages.container().name
    assert [line.split()[1:3] for line in lines] == [["added", name], ["deleted", name]]
    request = server.requests["WatchContainers"][0]
    assert (request.resume_token, request.changes_only, len(request.filter.states)) == ("t0", True, 1)
    ended = await run(server.address, "-o", "json", "watch")
    shown = [json.loads(line) for line in ended.out.splitlines()]
    assert [(event["event"], event["resume_token"]) for event in shown] == [
        ("added", "t1"),
        ("checkpoint", "t2"),
        ("deleted", "t3"),
    ]
    assert shown[0]["container"]["name"] == name


async def test_a_watch_of_volumes_shows_the_containers_that_mount_them(server: ScriptedServer) -> None:
    async def volume_changes(_: Any, context: Context) -> AsyncIterator[volume_service_pb2.WatchVolumesResponse]:
        yield messages.volume_watch_event("t1", added=messages.volume())
        yield messages.volume_watch_event("t2", checkpoint=WatchCheckpoint(list_complete=True))
        yield messages.volume_watch_event("t3", modified=messages.volume("data", "train", "serve"))
        await abort(context, grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")

    server.on("WatchVolumes", volume_changes)
    ended = await run(server.address, "volume", "watch", "--owner", "me", "--resume-token", "t0", "--changes-only")
    assert "RESUME_TOKEN_EXPIRED" in ended.err
    header, *lines = [line.split() for line in ended.out.splitlines()]
    assert header[1:] == ["EVENT", "NAME", "STATE", "SIZE", "REVISION", "CONTAINERS", "OPERATION"]
    assert [(line[1], line[2], line[-1]) for line in lines] == [
        ("added", "data", "-"),
        ("modified", "data", "train,serve"),
    ]
    request = server.requests["WatchVolumes"][0]
    assert (request.resume_token, request.changes_only, request.filter.owner) == ("t0", True, "me")
    ended = await run(server.address, "-o", "json", "volume", "watch")
    shown = [json.loads(line) for line in ended.out.splitlines()]
    assert [event["event"] for event in shown] == ["added", "checkpoint", "modified"]
    assert shown[2]["volume"]["attached_containers"] == ["train", "serve"]
    assert shown[1]["list_complete"] is True


async def test_create_sends_its_options_and_shows_stages_and_result(server: ScriptedServer) -> None:
    server.on("CreateContainer", created)
    options = (
        *("--gpus", "2", "--gpu-model", "a100", "-p", "8080:80", "-p", "53/udp", "-e", "A=b=c", "-v", "data:/data"),
        *("-v", "/srv/x:/x:ro", "--tmpfs", "/scratch:1G", "--label", "team=ml", "--cpus", "1.5", "--memory", "8G"),
        *("--pids-limit", "64"),
        *("--shm-size", "512MiB", "--restart", "on-failure:3", "--health-cmd", "true", "--hostname", "h"),
        *("--user", "1000", "--workdir", "/w", "--tty", "--pull", "never", "--create-only"),
    )
    ended = await run(server.address, "create", "train", "busybox", *options, "--", "sh", "-c", "sleep 9")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0].split()[:4] == ["NAME", "STATE", "GPUS", "PORTS"]
    assert ended.out.splitlines()[1].split()[:5] == ["train", "RUNNING", "1", "40001->80/tcp", "busybox"]
    assert ended.err.splitlines() == [
        "pull-image  done    1.5s  3.0 MiB",
        "create      done    0.2s",
        "start       done    1.5s",
    ]
    [request] = server.requests["CreateContainer"]
    spec = request.spec
    assert (request.pull_policy, request.create_only, spec.tty) == (pb.PULL_POLICY_NEVER, True, True)
    assert (spec.gpus.count, spec.gpus.model, list(spec.command)) == (2, "a100", ["sh", "-c", "sleep 9"])
    assert [(port.host_port, port.container_port, port.protocol) for port in spec.ports] == [(8080, 80, 1), (0, 53, 2)]
    assert list(spec.mounts) == [
        Mount(volume="data", target="/data"),
        Mount(host_path="/srv/x", target="/x", read_only=True),
        Mount(tmpfs=TmpfsMount(size_bytes=2**30), target="/scratch"),
    ]
    assert (dict(spec.env), dict(spec.labels)) == ({"A": "b=c"}, {"team": "ml"})
    assert (spec.cpus, spec.memory_bytes, spec.shm_size_bytes) == (1.5, 8 * 2**30, 512 * 2**20)
    assert spec.pids_limit == 64
    assert spec.restart_policy == RestartPolicy(policy=RESTART_POLICY_KIND_ON_FAILURE, max_retry_count=3)
    assert list(spec.health_check.command) == ["/bin/sh", "-c", "true"]


async def test_json_results_are_the_only_output_on_stdout(server: ScriptedServer) -> None:
    server.on("CreateContainer", created)
    server.on("ListContainers", reply_with(pb.ListContainersResponse(containers=[messages.container()])))
    made = await run(server.address, "-o", "json", "create", "train", "busybox")
    assert json.loads(made.out)["status"]["gpu_uuids"] == ["GPU-1"]
    listed = json.loads((await run(server.address, "-o", "json", "ps", "--state", "running", "--label", "team")).out)
    assert [item["name"] for item in listed] == ["train"]
    assert listed[0]["spec"]["memory_bytes"] == str(2**30)
    assert server.requests["ListContainers"][0].filter.labels["team"] == ""


async def test_lists_are_printed_as_tables(server: ScriptedServer) -> None:
    gpu = gpu_pb2.Gpu(uuid="GPU-1", name="A100", memory_total_bytes=80 * 2**30, health=gpu_pb2.GPU_HEALTH_HEALTHY)
    gpu.utilization_percent = 0
    gpu.container = "train"
    server.on("ListGpus", reply_with(node_service_pb2.ListGpusResponse(gpus=[gpu])))
    row = (await run(server.address, "gpus", "--held")).out.splitlines()[1]
    assert re.split(r"\s{2,}", row) == ["0", "GPU-1", "A100", "80.0 GiB", "-", "0%", "-", "-", "HEALTHY", "train"]
    assert server.requests["ListGpus"][0].filter.claimed is True
    lost = gpu_pb2.Gpu(
        uuid="GPU-2", health=gpu_pb2.GPU_HEALTH_LOST, health_message="XID 79", unschedulable_reason="XID 79"
    )
    divided = gpu_pb2.Gpu(uuid="GPU-3", health=gpu_pb2.GPU_HEALTH_HEALTHY, unschedulable_reason="its MIG mode is on")
    server.on("ListGpus", reply_with(node_service_pb2.ListGpusResponse(gpus=[lost, divided])))
    rows = (await run(server.address, "gpus")).out.splitlines()[1:]
    shown = [re.split(r"\s{2,}", row)[-2:] for row in rows]
    assert shown == [["LOST (XID 79)", "-"], ["HEALTHY (its MIG mode is on)", "-"]]
    claim = PortClaim(host_port=40001, protocol=PORT_PROTOCOL_TCP, container="train", container_port=80)
    server.on("ListPorts", reply_with(node_service_pb2.ListPortsResponse(ports=[claim])))
    assert (await run(server.address, "ports")).out.splitlines()[1].split() == ["40001", "tcp", "train", "80"]
    server.on("GetNode", reply_with(node_service_pb2.GetNodeResponse(node=Node(name="gpu1", free_gpus=3))))
    assert "GPUs:" in (await run(server.address, "node")).out
    server.on("GetContainer", reply_with(pb.GetContainerResponse(container=messages.container())))
    assert "memory:           1.0 GiB" in (await run(server.address, "get", "train")).out
    snapshot = messages.operation(*STAGES)
    server.on("ListOperations", reply_with(operation_service_pb2.ListOperationsResponse(operations=[snapshot])))
    assert messages.OPERATION_ID in (await run(server.address, "operations", "list", "--container", "train")).out
    assert server.requests["ListOperations"][0].filter.target.name == "train"
    server.on("GetOperation", reply_with(operation_service_pb2.GetOperationResponse(operation=snapshot)))
    assert "pull-image  SUCCEEDED  1.5s  3.0 MiB" in (await run(server.address, "operations", "get", "x")).out


async def test_a_plan_is_the_only_output_of_validate_only(server: ScriptedServer) -> None:
    async def planned(_: Any, __: Context) -> AsyncIterator[pb.ScaleContainerResponse]:
        plan = operation_pb2.OperationPlan(
            stages=["stop", "carry"],
            gpus_to_claim=2,
            warnings=["sockets are lost"],
            apparent_bytes=3 << 30,
            allocated_bytes=1 << 20,
            expected_freeze=Duration(nanos=300_000_000),
        )
        yield pb.ScaleContainerResponse(operation=operation_pb2.Operation(plan=plan))

    server.on("ScaleContainer", planned)
    server.on("GetContainer", reply_with(pb.GetContainerResponse(container=messages.container())))
    ended = await run(
        server.address, "scale", "train", "--gpus", "4", "--memory", "0", "--strategy", "live", "--validate-only"
    )
    assert ended.out.splitlines()[0].split() == ["stages:", "stop,", "carry"]
    assert "sockets are lost" in ended.out
    assert "3.0 GiB, 1.0 MiB on the disk" in ended.out
    assert "frozen for about:" in ended.out
    [request] = server.requests["ScaleContainer"]
    assert (request.validate_only, request.strategy) == (True, pb.SCALE_STRATEGY_LIVE)
    assert (request.HasField("memory_bytes"), request.HasField("cpus")) == (True, False)


async def test_update_sends_its_options_and_clears_named_fields(server: ScriptedServer) -> None:
    async def updated(_: Any, __: Context) -> AsyncIterator[pb.UpdateContainerResponse]:
        yield pb.UpdateContainerResponse(result=messages.container())

    server.on("UpdateContainer", updated)
    options = ("--image", "other", "-e", "A=1", "-v", "data:/data", "--no-tty", "--cpus", "0", "--keep-revisions", "3")
    more = ("--clear", "ports", "--clear", "health-check", "--files", "discard", "--snapshots", "never")
    ended = await run(server.address, "update", "train", *options, *more, "--", "sleep", "9")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[1].startswith("train")
    [request] = server.requests["UpdateContainer"]
    changed = ["command", "cpus", "health_check", "image", "ports", "revision_policy.keep_revisions", "tty"]
    assert sorted(request.update_mask.paths) == changed
    assert request.edits == pb.ContainerSpecEdits(set_env={"A": "1"}, add_mounts=[Mount(volume="data", target="/data")])
    assert (request.files, request.snapshots) == (pb.FILES_POLICY_DISCARD, SNAPSHOT_POLICY_NEVER)
    assert (list(request.spec.command), dict(request.spec.env), request.spec.image) == (["sleep", "9"], {}, "other")
    assert request.spec.revision_policy.keep_revisions == 3
    assert not request.spec.HasField("health_check")


async def test_clone_sends_its_differences(server: ScriptedServer) -> None:
    async def cloned(_: Any, __: Context) -> AsyncIterator[pb.CloneContainerResponse]:
        yield pb.CloneContainerResponse(result=messages.container("other"))

    source = ContainerRevision(container="train", revision=3)
    source.spec.gpus.model = "a100"
    server.on("GetContainerRevision", reply_with(pb.GetContainerRevisionResponse(revision=source)))
    server.on("CloneContainer", cloned)
    options = ("--revision", "3", "--gpus", "1", "--clear", "ports", "--owner", "me", "--create-only")
    ended = await run(server.address, "clone", "train", "other", *options, "--", "sleep", "9")
    assert (ended.code, ended.out.splitlines()[1].split()[0]) == (0, "other"), ended.err
    [request] = server.requests["CloneContainer"]
    assert (request.source, request.name, request.revision, request.owner) == ("train", "other", 3, "me")
    assert sorted(request.update_mask.paths) == ["command", "gpus", "ports"]
    assert (request.spec.gpus.count, list(request.spec.command), request.create_only) == (1, ["sleep", "9"], True)
    assert request.spec.gpus.model == "a100", "a number alone leaves the kind of GPUs as it is"
    assert server.requests["GetContainerRevision"][0].revision == 3


async def test_revisions_are_a_table_that_marks_the_current_one(server: ScriptedServer) -> None:
    first = ContainerRevision(container="train", revision=1, gpu_uuids=["GPU-1"], layer_bytes=3 * 2**20)
    first.spec.image, first.cause = "busybox", REVISION_CAUSE_CREATED
    first.snapshot.kind, first.snapshot.new_bytes = SNAPSHOT_KIND_TREE, 2**20
    two = ContainerRevision(container="train", revision=2, cause=REVISION_CAUSE_ROLLED_BACK, current=True)
    two.spec.image = "busybox"
    server.on("ListContainerRevisions", reply_with(pb.ListContainerRevisionsResponse(revisions=[first, two])))
    head, *rows = (await run(server.address, "revisions", "train")).out.splitlines()
    assert head.split() == ["REVISION", "CAUSE", "GPUS", "IMAGE", "SIZE", "SNAPSHOT", "AGE"]
    assert re.split(r"\s{2,}", rows[0]) == ["1", "CREATED", "1", "busybox", "3.0 MiB", "tree"]
    assert re.split(r"\s{2,}", rows[1]) == ["2 *", "ROLLED_BACK", "0", "busybox", "-", "-"]
    server.on("GetContainerRevision", reply_with(pb.GetContainerRevisionResponse(revision=first)))
    shown = (await run(server.address, "revision", "get", "train", "1")).out
    assert "on the disk:  1.0 MiB that no other one has" in shown
    assert server.requests["GetContainerRevision"][0].revision == 1
    server.on("DeleteContainerRevision", error_reply(grpc.StatusCode.FAILED_PRECONDITION, "REVISION_IS_CURRENT"))
    assert (await run(server.address, "revision", "delete", "train", "2")).code == 7


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", 2),
        (grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND", 3),
        (grpc.StatusCode.ABORTED, "CONTAINER_BUSY", 6),
        (grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_RUNNING", 7),
        (grpc.StatusCode.INTERNAL, "INTERNAL", 1),
    ],
)
async def test_an_error_is_one_line_and_an_exit_code(
    server: ScriptedServer, code: grpc.StatusCode, reason: str, exit_code: int
) -> None:
    violations = [("name", "too long"), ("force", "no")] if exit_code == 2 else []
    metadata = {"operation_id": "17"} if exit_code == 6 else {}
    server.on("DeleteContainer", error_reply(code, reason, "message", violations=violations, metadata=metadata))
    ended = await run(server.address, "delete", "train")
    lines = [f"error: {reason}: message"]
    if violations:
        lines = [f"error: {reason}: 2 fields are not valid", "  name: too long", "  force: no"]
    hint = {
        6: ["next: wait for the operation: gpudock operations watch 17"],
        3: ["next: list the containers: gpudock ps"],
    }
    assert (ended.code, ended.out, ended.err.splitlines()) == (exit_code, "", lines + hint.get(exit_code, []))


async def test_a_single_violation_is_printed_once(server: ScriptedServer) -> None:
    """The message of the error contains the violation already."""
    wrong = error_reply(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "a: b", violations=[("a", "b")])
    server.on("DeleteContainer", wrong)
    assert (await run(server.address, "rm", "train")).err == "error: INVALID_ARGUMENT: a: b\n"


async def test_a_failed_operation_shows_its_failed_stage(server: ScriptedServer) -> None:
    async def exhausted(_: Any, context: Context) -> AsyncIterator[Created]:
        stages = (messages.stage("claim", operation_pb2.OPERATION_STAGE_STATE_FAILED, seconds=0),)
        yield Created(operation=messages.operation(*stages, state=operation_pb2.OPERATION_STATE_FAILED))
        await abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_EXHAUSTED", "1 of 4 GPUs is free")

    server.on("CreateContainer", exhausted)
    ended = await run(server.address, "create", "train", "busybox", "--gpus", "4")
    assert ended.err.splitlines() == [
        "claim  failed  0.0s",
        "error: GPU_EXHAUSTED: 1 of 4 GPUs is free",
        "next: list the GPUs and who holds them: gpudock gpus",
    ]
    assert (ended.code, ended.out) == (4, "")


@pytest.mark.parametrize("command", ["ps", "create train busybox", "operations watch 17"])
async def test_a_missing_daemon_is_reported_with_a_next_step(server: ScriptedServer, command: str) -> None:
    await server.stop()
    ended = await run(server.address, *command.split())
    assert ended.code == 8
    sentence, step = ended.err.splitlines()
    assert sentence.startswith(f"error: UNAVAILABLE: gpudockd does not answer at {server.address}: ")
    assert step == "next: check that it runs: systemctl status gpudockd; or give another --address"


async def test_ctrl_c_prints_that_the_operation_continues(server: ScriptedServer) -> None:
    async def endless(_: Any, __: Context) -> AsyncIterator[Created]:
        yield Created(operation=messages.operation(STAGES[0], messages.stage("create", messages.RUNNING)))
        await asyncio.Event().wait()

    server.on("CreateContainer", endless)
    process = await spawn(server.address, "create", "train", "busybox")
    assert process.stderr is not None
    assert (await asyncio.wait_for(process.stderr.readline(), limit(DEADLINE))).startswith(b"pull-image")
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), limit(DEADLINE))
    assert process.returncode == 130
    assert err.decode().splitlines() == [
        f"interrupted; operation {messages.OPERATION_ID} continues",
        f"  watch it:  gpudock operations watch {messages.OPERATION_ID}",
        f"  cancel it: gpudock operations cancel {messages.OPERATION_ID}",
    ]


async def test_cancel_waits_for_the_undo(server: ScriptedServer) -> None:
    async def undone(_: Any, context: Context) -> AsyncIterator[operation_service_pb2.WatchOperationResponse]:
        stages = (messages.stage("create", operation_pb2.OPERATION_STAGE_STATE_UNDONE),)
        yield operation_service_pb2.WatchOperationResponse(operation=messages.operation(*stages))
        await abort(context, grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED", "cancelled")

    ended_operation = messages.operation(state=operation_pb2.OPERATION_STATE_CANCELLED)
    server.on(
        "CancelOperation", reply_with(operation_service_pb2.CancelOperationResponse(operation=messages.operation()))
    )
    server.on("WatchOperation", undone)
    server.on("GetOperation", reply_with(operation_service_pb2.GetOperationResponse(operation=ended_operation)))
    ended = await run(server.address, "operations", "cancel", messages.OPERATION_ID, "--wait")
    assert (ended.code, ended.err) == (0, "create  undone  1.5s\n")
    assert "CANCELLED" in ended.out
    assert (await run(server.address, "operations", "watch", messages.OPERATION_ID)).code == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("create c i --memory lots", "invalid size 'lots'; use"),
        ("create c i --gpus 1 --gpu GPU-1", "selects GPUs by UUID"),
        ("create c i --gpu-model a100", "need --gpus"),
        ("create c i -e NOT_SET_ANYWHERE", "is not set in the environment"),
        ("create c i --label A", "give KEY=VALUE"),
        ("create c i --pull unknown", "'unknown' is not one of"),
        ("create c i -e A=\udcff", "not UTF-8"),
        ("delete \udcff", "not UTF-8"),
        ("scale c", "nothing to change"),
        ("update c", "nothing to change"),
        ("update c --clear image", "is not one of"),
        ("clone c", "Missing argument"),
        ("exec c --", "COMMAND is missing"),
        ("exec c", "Missing argument"),
        ("--cert /dev/null ps", "needed together"),
        ("--token-file /nowhere ps", "does not exist"),
    ],
)
def test_wrong_usage_is_refused_without_a_call(arguments: str, message: str) -> None:
    result = CliRunner().invoke(main, ["--address", "/nowhere", *arguments.split()])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    "command",
    [
        "",
        *main.commands,
        "operations list",
        "operations get",
        "revision get",
        "revision delete",
        "volume create",
        "volume list",
        "volume get",
        "volume resize",
        "volume delete",
        "volume adopt",
        "volume revisions",
    ],
)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(main, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


@pytest.mark.parametrize(
    ("image", "sent"),
    [
        ("team/model", ("team/model", "")),
        ("team/model:v1", ("team/model", "v1")),
        ("reg:5000/model", ("reg:5000/model", "")),
        ("reg:5000/model:v1", ("reg:5000/model", "v1")),
    ],
)
async def test_commit_sends_its_options_and_shows_the_image(
    server: ScriptedServer, image: str, sent: tuple[str, str]
) -> None:
    async def committed(_: Any, __: Context) -> AsyncIterator[pb.CommitContainerResponse]:
        yield pb.CommitContainerResponse(operation=messages.operation())
        yield pb.CommitContainerResponse(
            result=CommittedImage(id="sha256:1", name="n", size_bytes=2**20, container="train")
        )

    server.on("CommitContainer", committed)
    ended = await run(
        server.address, "commit", "train", image, "-m", "note", "-c", "CMD x", "-c", "USER 1", "--no-pause", "--replace"
    )
    assert ended.out.splitlines()[1].split() == ["id:", "sha256:1"]
    assert "1.0 MiB" in ended.out
    [request] = server.requests["CommitContainer"]
    assert (request.repository, request.tag) == sent
    assert (request.comment, list(request.changes), request.pause) == ("note", ["CMD x", "USER 1"], False)
    assert request.replace
