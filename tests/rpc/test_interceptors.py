"""Errors, identity and audit log of all four kinds of calls."""

from __future__ import annotations

import asyncio
import string
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf.message import Message as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from gpudock_server import errors
from gpudock_server.rpc.middleware.errors import status_of
from gpudock_server.rpc.middleware.identity import UNIX, caller
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.settings.definitions import Settings
from grpc_status import rpc_status
from structlog.testing import capture_logs

from tests.rig.patience import limit
from tests.rpc.in_memory_server import reason_of
from tests.rpc.probe import KINDS, Message, Probe, begin, call, serve_probe

PRINTABLE = string.punctuation.replace("%", "") + " "
SECRET = "hunter2-in-an-exception"  # noqa: S105 - a test secret


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
async def channel(probe: Probe, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    path = tmp_path / "gpudock.sock"
    async with serve_probe(probe, Settings(socket=path)), grpc.aio.insecure_channel(f"unix:{path}") as opened:
        yield opened


def raising(error: BaseException) -> Callable[[Any], Coroutine[Any, Any, NoReturn]]:
    async def act(_context: Any) -> NoReturn:
        await asyncio.sleep(0)
        raise error

    return act


async def failure(channel: grpc.aio.Channel, kind: str, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, kind, **options)
    return raised.value


def rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """Return the status of a failed call, and fail unless it fits into the 8 KiB of trailers that clients accept."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # the type stubs lack asyncio calls
    assert status is not None
    assert len(b64encode(status.SerializeToString())) + len(quote(error.details() or "", safe=PRINTABLE)) < 7500
    return status


def detail(status: status_pb2.Status, kind: type[AnyMessage]) -> Any:
    found = kind()
    unpacked = [packed for packed in status.details if packed.Unpack(found)]
    assert len(unpacked) == 1, f"{kind} in {status}"
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_of_every_kind_pass_through(channel: grpc.aio.Channel, kind: str) -> None:
    replies = await call(channel, kind)
    assert [reply.name for reply in replies] == {
        "OneToOne": ["train"],
        "OneToMany": ["train", "train"],
        "ManyToOne": ["other"],
        "ManyToMany": ["train", "other", "other"],
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_of_the_contract_becomes_a_status_with_details(
    channel: grpc.aio.Channel, probe: Probe, kind: str
) -> None:
    probe.act = raising(errors.GpuExhausted(requested=4, free=2, matching=1, total=8))
    error = await failure(channel, kind)
    status = rich_status(error)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("gpudock", "GPU_EXHAUSTED")
    assert dict(info.metadata) == {"requested": "4", "free": "2", "matching": "1", "total": "8"}
    assert detail(status, error_details_pb2.QuotaFailure).violations[0].subject == "gpus"


async def test_a_failed_stream_delivers_its_earlier_messages(channel: grpc.aio.Channel, probe: Probe) -> None:
    probe.act = raising(errors.ContainerNotFound("train"))
    call_in_progress = begin(channel, "OneToMany")
    assert (await call_in_progress.read()).name == "train"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call_in_progress.read()
    resource = detail(rich_status(raised.value), error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("gpudock.v1.Container", "train")


async def test_violations_and_retry_delays_are_details(channel: grpc.aio.Channel, probe: Probe) -> None:
    violations = (errors.FieldViolation("name", "is taken"), errors.FieldViolation("spec.cpus", "is below 0"))
    probe.act = raising(errors.InvalidArgument(violations))
    bad = detail(rich_status(await failure(channel, "OneToOne")), error_details_pb2.BadRequest)
    assert [(found.field, found.description) for found in bad.field_violations] == [
        ("name", "is taken"),
        ("spec.cpus", "is below 0"),
    ]
    probe.act = raising(errors.EngineUnavailable(call="create", detail="refused"))
    retry = detail(rich_status(await failure(channel, "OneToOne")), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta() == timedelta(seconds=5)


@pytest.mark.parametrize("text", ["x", "é", "\n", "\udc80", "%"])
async def test_a_status_too_long_for_the_trailers_is_shortened(
    channel: grpc.aio.Channel, probe: Probe, text: str
) -> None:
    violations = tuple(errors.FieldViolation(f"spec.env[{n}]", text * 1000) for n in range(1000))
    probe.act = raising(errors.InvalidArgument(violations))
    status = rich_status(await failure(channel, "OneToOne"))
    listed = detail(status, error_details_pb2.BadRequest).field_violations
    assert listed[0].field == "spec.env[0]"
    assert listed[-1].description == f"{1000 - (len(listed) - 1)} more violations; fix these first"
    assert detail(status, error_details_pb2.ErrorInfo).metadata["fields"].startswith("spec.env[0],")

    metadata = {f"key{n}": text * 5000 for n in range(100)}
    probe.act = raising(errors.OperationFailed(9, "START_FAILED", text * 100_000, metadata))
    status = rich_status(await failure(channel, "OneToOne"))
    assert detail(status, error_details_pb2.ErrorInfo).reason == "START_FAILED"


async def test_a_recorded_error_has_the_same_status_as_the_original(channel: grpc.aio.Channel, probe: Probe) -> None:
    original = errors.GpuExhausted(requested=4, free=2, matching=1, total=8)
    recorded = errors.OperationFailed(original.code, original.reason, original.message, original.metadata)
    probe.act = raising(recorded)
    assert rich_status(await failure(channel, "OneToMany")) == status_of(original)
    # An error that was recorded with the code OK is INTERNAL.
    assert status_of(errors.OperationFailed(0, "GPU_EXHAUSTED", "", {})).code == errors.Code.INTERNAL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [RuntimeError(SECRET), TimeoutError(SECRET), ExceptionGroup(SECRET, [ValueError(SECRET)])],
    ids=lambda error: type(error).__name__,
)
async def test_an_unexpected_exception_is_reported_by_an_id_without_its_text(
    channel: grpc.aio.Channel, probe: Probe, kind: str, error: Exception
) -> None:
    probe.act = raising(error)
    with capture_logs() as logged:
        found = await failure(channel, kind)
    lines = [line for line in logged if line["event"] == "unexpected error"]
    assert len(lines) == 1
    error_id = lines[0]["error_id"]
    assert lines[0]["exc_info"] is error
    assert found.code() is grpc.StatusCode.INTERNAL
    assert found.details() == f"internal error, id {error_id}"
    status = rich_status(found)
    assert reason_of(found) == "INTERNAL"
    assert detail(status, error_details_pb2.ErrorInfo).metadata["error_id"] == error_id
    assert SECRET not in str(status)


async def test_a_task_group_that_failed_with_one_error_of_the_contract_ends_with_that_error(
    channel: grpc.aio.Channel, probe: Probe
) -> None:
    async def act(_context: Context) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(raising(errors.ContainerNotFound("train"))(None))
            group.create_task(asyncio.sleep(60))

    probe.act = act
    assert (await failure(channel, "OneToOne")).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("kind", KINDS)
async def test_an_abort_by_a_handler_keeps_its_status(channel: grpc.aio.Channel, probe: Probe, kind: str) -> None:
    async def act(context: Context) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "as the handler says")

    probe.act = act
    error = await failure(channel, kind)
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "as the handler says")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_disconnect_cancels_the_handler_at_once(channel: grpc.aio.Channel, probe: Probe, kind: str) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def act(_context: Context) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise

    probe.act = act
    with capture_logs() as logged:
        calling = begin(channel, kind)
        await asyncio.wait_for(started.wait(), limit(10))
        calling.cancel()
        await asyncio.wait_for(ended.wait(), limit(10))
        # The rest of the cancelled call runs in the next iterations of the event loop.
        for _ in range(100):
            await asyncio.sleep(0)
    assert [line["outcome"] for line in logged if line["event"] == "call"] == ["CANCELLED"]
    assert "unexpected error" not in [line["event"] for line in logged]
    if kind == "OneToMany":
        assert probe.ended == ["OneToMany"], "the generator was not closed with its call"


@pytest.mark.usefixtures("channel")
async def test_writing_after_a_disconnect_is_no_error(probe: Probe, tmp_path: Path) -> None:
    async def act(context: Context) -> None:
        while True:
            await context.write(Message(name="x" * 65536))

    probe.act = act
    with capture_logs() as logged:
        for round_number in range(20):
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/gpudock.sock") as client:
                call_in_progress = begin(client, "OneToMany")
                await call_in_progress.read()
                await call_in_progress.read()
                # Half of the calls are cancelled; the others end with their connection.
                if round_number % 2:
                    call_in_progress.cancel()
        async with asyncio.timeout(limit(10)):
            while len(outcomes := [line["outcome"] for line in logged if line["event"] == "call"]) < 20:
                await asyncio.sleep(0.001)
        assert len(probe.ended) == 20
    assert set(outcomes) == {"CANCELLED"}
    assert "unexpected error" not in [line["event"] for line in logged]


async def test_a_disconnect_that_a_failed_task_group_swallows_is_cancelled(
    channel: grpc.aio.Channel, probe: Probe
) -> None:
    """On a busy machine, grpc raises InternalError first and cancels the handler while its task group ends."""
    failing = asyncio.Event()
    handlers: list[asyncio.Task[Any]] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            failing.set()
            # Until the handler is cancelled, and its task group has handled that.
            while not handlers[0].cancelling():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.001)

    async def act(_context: Context) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        handlers.append(handler)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(slow_to_end())
            await asyncio.sleep(0)
            raise grpc.aio.InternalError

    probe.act = act
    with capture_logs() as logged:
        call_in_progress = begin(channel, "OneToMany")
        await call_in_progress.read()
        await asyncio.wait_for(failing.wait(), limit(10))
        call_in_progress.cancel()
        async with asyncio.timeout(limit(10)):
            while not (outcomes := [line["outcome"] for line in logged if line["event"] == "call"]):
                await asyncio.sleep(0.001)
    assert outcomes == ["CANCELLED"]
    assert "unexpected error" not in [line["event"] for line in logged]


async def test_a_cancelled_task_that_a_handler_awaits_is_an_internal_error(
    channel: grpc.aio.Channel, probe: Probe
) -> None:
    probe.act = raising(asyncio.CancelledError())
    assert (await failure(channel, "OneToOne")).code() is grpc.StatusCode.INTERNAL


async def test_a_synchronous_handler_is_refused_since_the_interceptors_do_not_run(
    channel: grpc.aio.Channel,
) -> None:
    assert (await failure(channel, "Sync")).code() is grpc.StatusCode.INTERNAL


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    error = await failure(channel, "OneToOne", service="gpudock.probe.Nothing")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_call_by_the_unix_socket_has_its_caller_and_log_context(
    channel: grpc.aio.Channel, probe: Probe
) -> None:
    identities: list[Any] = []

    async def act(_context: Context) -> None:
        identities.extend([caller(), structlog.contextvars.get_contextvars()])

    probe.act = act
    await call(channel, "OneToOne")
    assert identities == [UNIX, {"rpc": "/gpudock.probe.Probe/OneToOne", "caller_kind": "unix", "caller": ""}]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_mutation_writes_one_audit_line(channel: grpc.aio.Channel, probe: Probe, kind: str) -> None:
    probe.act = raising(errors.ContainerNotFound("train"))
    with capture_logs() as logged:
        await failure(channel, kind, requests=[Message(name="train", request_id="7", start=None)])
    lines = [line for line in logged if line["event"] == "call"]
    assert len(lines) == 1
    assert lines[0]["duration_seconds"] >= 0
    expected = {
        "method": kind,
        "caller_kind": "unix",
        "caller": "",
        "target": "train",
        "request_id": "7",
        "outcome": "NOT_FOUND",
    }
    assert expected.items() <= lines[0].items()


async def test_an_audit_line_is_short_for_any_request(channel: grpc.aio.Channel) -> None:
    with capture_logs() as logged:
        await call(channel, "OneToOne", requests=[Message(name="é" * 500_000, request_id="7" * 500_000)])
    (line,) = [line for line in logged if line["event"] == "call"]
    assert (line["target"], line["request_id"]) == ("é" * 128 + "…", "7" * 256 + "…")


async def test_the_first_message_of_an_exec_names_its_container(channel: grpc.aio.Channel) -> None:
    with capture_logs() as logged:
        await call(channel, "ManyToMany", requests=[Message(start=Message(container="train")), Message()])
    assert [(line["target"], line["outcome"]) for line in logged if line["event"] == "call"] == [("train", "OK")]


async def test_reads_are_not_audited(channel: grpc.aio.Channel) -> None:
    with capture_logs() as logged:
        await call(channel, "GetSomething")
        await call(channel, "OneToOne", service="grpc.health.v1.Health")
    assert [line for line in logged if line["event"] == "call"] == []
