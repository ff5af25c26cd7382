"""Random requests for every RPC, from the descriptors of the contract, so that new RPCs and fields are covered.

Half of the values are plausible, so that requests pass the first checks; the others are any values that can be encoded.
`CALLS` are the RPCs, `requests` and `corrupted` draw their requests, and `outcome` makes a call.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc.aio
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from gpudock.v1 import container_service_pb2, node_service_pb2, operation_service_pb2, volume_service_pb2
from hypothesis import strategies as st

# The total requests that a test draws; acceptance runs set 100000.
EXAMPLES = int(os.environ.get("GPUDOCK_FUZZ_EXAMPLES", "3000"))


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC: its path, and its request and response."""

    path: str
    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool


CALLS = tuple(
    Call(
        path=f"/{service.full_name}/{method.name}",
        request=GetMessageClass(method.input_type),
        response=GetMessageClass(method.output_type),
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
    )
    for module in (container_service_pb2, volume_service_pb2, node_service_pb2, operation_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)

_NAMES = ("a", "train", "a-b-c", "x" * 63)
_PATHS = ("/", "/data", "/data/a", "/proc/self", "/a/../b", "/a//b", "data", "/" + "a" * 5000)
_UUIDS = ("1b4e28ba-2fa1-41d2-883f-0016d3cca427", "1B4E28BA-2FA1-41D2-883F-0016D3CCA427", "GPU-0", "GPU-1")
_HINTS: Mapping[str, tuple[str, ...]] = {
    "name": _NAMES,
    "container": _NAMES,
    "source": _NAMES,
    "id": _UUIDS,
    "exec_id": _UUIDS,
    "request_id": _UUIDS,
    "uuids": _UUIDS,
    "image": ("busybox:latest", "busybox", "reg:5000/a/b@sha256:" + "0" * 64, "sha256:" + "f" * 64, "a" * 600),
    "target": _PATHS,
    "host_path": _PATHS,
    "working_dir": _PATHS,
    "user": ("root", "0:0", "1000", "a:b:c", "-1", "99999999999"),
    "hostname": ("box", "a.b", "-a", "b" * 64),
    "signal": ("TERM", "SIGKILL", "SIGRTMIN+3", "9", "0", "-1", "BOGUS"),
    "stop_signal": ("TERM", "SIGINT", "15", "NONE"),
    "volume": ("data", "..", "a/b"),
    "page_token": ("", "AAAA", "bm9wZQ", "é", "====", "A" * 4000),
    "resume_token": ("", "AAAA", "bm9wZQ", "é", "====", "A" * 4000),
    "etag": ("", "775baa82.1"),
    "repository": ("fuzzed/image", "a", "reg:5000/a/b", "Upper/case", "a//b", "gpudock/layer", "f" * 64, "a" * 300),
    "tag": ("v1", "", "a.b-c_d", "-a", "x" * 129),
    "changes": ("CMD true", 'ENTRYPOINT ["sh", "-c"]', "ENV A=$PATH", "EXPOSE 80/tcp 1-2", "RUN rm -rf /", "LABEL a"),
    "owner": ("", "team@example.com"),
    "command": ("true", "", "-c"),
    "paths": ("env", "image", "mounts", "*", "env.A", "labels.`a.b`", "spec.gpus.count", "gpus"),
}
_ODD = ("", "\0", "é" * 300, "/", "=", "\n", "'\"`$()", "a" * 70_000, "gpudock.uid", "NVIDIA_VISIBLE_DEVICES", "a b")
_TEXT = st.sampled_from(_ODD) | st.text(max_size=8)
_NUMBERS: Mapping[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from((0.0, -0.0, 0.5, 0.01, 4.0, math.nan, math.inf)) | st.floats(),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 8, 99, -1)),
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from((0, 1, 2, 16, 17, 80, 4096, 65535, 65536, 2**31 - 1, -(2**31), -1)),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from((0, 1, 4095, 4096, 6 << 20, 8 << 30, 2**63 - 1, -(2**63), -1)),
}


def requests(message: type[Message]) -> st.SearchStrategy[Any]:
    """Draw messages of this type."""
    return _of(message.DESCRIPTOR)  # type: ignore[arg-type]  # two names of one type


def corrupted(message: type[Message]) -> st.SearchStrategy[Any]:
    """Draw messages of this type that are decoded from bytes with random changes."""
    return st.tuples(requests(message), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8)).map(
        lambda drawn: _corrupt(*drawn)
    )


def changes(message: type[Message]) -> st.SearchStrategy[Callable[[Message], None]]:
    """Draw changes of one field of a message of this type, also of nested messages, to any value."""
    fields = [_change_of(field) for field in message.DESCRIPTOR.fields]  # type: ignore[arg-type]  # two names of one type
    return st.one_of(fields)


def _change_of(field: FieldDescriptor) -> st.SearchStrategy[Callable[[Message], None]]:
    def change(value: Any) -> Callable[[Message], None]:
        def apply(message: Message) -> None:
            message.ClearField(field.name)
            _set(message, field, value)

        return apply

    def within(inner: Callable[[Message], None]) -> Callable[[Message], None]:
        return lambda message: inner(getattr(message, field.name))

    whole = _field(field).map(change)
    if field.message_type is None or field.is_repeated or not field.message_type.fields:
        return whole
    return whole | changes(GetMessageClass(field.message_type)).map(within)


def _corrupt(message: Message, changes: list[tuple[int, int]]) -> Message:
    raw = bytearray(message.SerializeToString())
    for offset, value in changes:
        if raw:
            raw[offset % len(raw)] = value
    try:
        return type(message).FromString(bytes(raw))
    except DecodeError:
        return message


def _of(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    if descriptor.full_name == "google.protobuf.Duration":
        return _durations(GetMessageClass(descriptor))
    return _message(descriptor)


@cache
def _message(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    message = GetMessageClass(descriptor)
    fields = tuple((field, _field(field)) for field in descriptor.fields)
    # One number selects the fields that are set: all, or any subset. A draw for each field would be slow.
    everything = 2 ** len(fields) - 1
    subsets = st.just(everything) | st.integers(0, everything)

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        built = message()
        subset = draw(subsets)
        for number, (field, values) in enumerate(fields):
            if subset >> number & 1:
                # The last field of a oneof counts, as in an encoded message.
                _set(built, field, draw(values))
        return built

    return build()


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    if isinstance(value, dict):
        getattr(message, field.name).update(value)
    elif isinstance(value, list):
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _durations(message: type[Message]) -> st.SearchStrategy[Any]:
    seconds = st.sampled_from((0, 1, 30, 86_400, 86_401, -1, -(2**63), 2**63 - 1, 315_576_000_001))
    nanos = st.sampled_from((0, 1, 999_999_999, 1_000_000_000, -1, -(2**31), 2**31 - 1))
    return st.builds(message, seconds=seconds, nanos=nanos)


def _field(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        keys, values = kind.fields_by_name["key"], kind.fields_by_name["value"]
        return st.dictionaries(_scalar(keys), _scalar(values), max_size=3)
    value = _of(kind) if kind is not None else _scalar(field)
    return st.lists(value, max_size=3) if field.is_repeated else value


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=40)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        hints = _HINTS.get(field.name)
        # Mostly the first hint, which is valid; otherwise nearly every request would fail at its first field.
        return st.sampled_from((*hints[:1] * 8, *hints, *_ODD)) if hints else _TEXT
    return _NUMBERS[field.cpp_type]


# The maximum number of messages that are read from a stream.
_READ_AT_MOST = 20
# These streams do not end; their first message shows that the request was accepted.
_ENDLESS = ("/WatchContainers", "/WatchVolumes")


# The client of grpc.aio ends a call with INTERNAL, and this in its debug string, if the server ended the call while the
# client was sending (StreamStreamCall._write in grpc/aio/_call.py). A pause after each message lets the client receive
# the end first; how long that takes depends on the machine.
_LOST_RACE = "execute_batch"
_PAUSES = (0.01, 0.1, 1.0, 5.0)


async def outcome(
    channel: grpc.aio.Channel, call: Call, messages: Sequence[Message], seconds: float
) -> grpc.StatusCode:
    """Make a call and return its status code. RPCs without client streaming get the first message.

    A stream that continues after some messages, or after `seconds`, is cancelled: CANCELLED or DEADLINE_EXCEEDED.
    """
    code = grpc.StatusCode.UNKNOWN
    for pause in _PAUSES:
        active = _begin(channel, call, messages, pause, seconds + pause * len(messages))
        if call.server_streaming:
            await _read(active, 1 if call.path.endswith(_ENDLESS) else _READ_AT_MOST)
        code = await active.code()
        if code is not grpc.StatusCode.INTERNAL or _LOST_RACE not in (await active.debug_error_string() or ""):
            break
    return code


def _begin(channel: grpc.aio.Channel, call: Call, messages: Sequence[Message], pause: float, seconds: float) -> Any:
    kind = f"{'stream' if call.client_streaming else 'unary'}_{'stream' if call.server_streaming else 'unary'}"
    stub = getattr(channel, kind)(
        call.path,
        request_serializer=call.request.SerializeToString,
        response_deserializer=call.response.FromString,
    )
    return stub(_paced(messages, pause) if call.client_streaming else messages[0], timeout=seconds)


async def _paced(messages: Sequence[Message], pause: float) -> AsyncIterator[Message]:
    for message in messages:
        yield message
        await asyncio.sleep(pause)


async def _read(active: Any, at_most: int) -> None:
    try:
        count = 0
        async for _ in active:
            count += 1
            if count == at_most:
                active.cancel()
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        # The status code of the call shows the reason.
        return
