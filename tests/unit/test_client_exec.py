"""What the client makes of an exec's messages without protobuf is what protobuf makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from gpudock._exec import Chunk, decode_response
from gpudock.v1 import exec_pb2
from hypothesis import given
from hypothesis import strategies as st

Answer = exec_pb2.ExecContainerResponse


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 524_288, 1 << 21])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_by_itself(stream: Any, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    fields: dict[str, Any] = {stream: data}
    assert decode_response(Answer(**fields).SerializeToString()) == Chunk(stream, data)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(),
        Answer(started=exec_pb2.ExecStarted(exec_id="made")),
        Answer(exited=exec_pb2.ExecExited(signal="SIGKILL", timed_out=True)),
    ],
)
def test_everything_else_is_its_message(answer: Answer) -> None:
    assert decode_response(answer.SerializeToString()) == answer


def test_one_that_holds_more_is_left_to_protobuf() -> None:
    # As the wire allows: of a field that comes twice, the last counts.
    raw = Answer(stdout=b"a").SerializeToString() + Answer(stdout=b"b").SerializeToString()
    assert decode_response(raw) == Answer(stdout=b"b")


@given(st.binary(max_size=12) | st.binary(max_size=12).map(lambda rest: b"\x12" + rest))
def test_any_bytes_are_what_protobuf_says_or_its_error(raw: bytes) -> None:
    try:
        expected = Answer.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode_response(raw)
        return
    found = decode_response(raw)
    if isinstance(found, Chunk):
        assert (found.stream, found.data) == (expected.WhichOneof("event"), getattr(expected, found.stream))
    else:
        assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
