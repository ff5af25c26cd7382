"""The client decodes exec responses without protobuf to the same result as protobuf."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from gpudock._exec import Chunk, decode_response
from gpudock.v1 import exec_pb2
from hypothesis import given
from hypothesis import strategies as st

Response = exec_pb2.ExecContainerResponse


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 524_288, 1 << 21])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_decoded_to_a_chunk(stream: Any, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    fields: dict[str, Any] = {stream: data}
    assert decode_response(Response(**fields).SerializeToString()) == Chunk(stream, data)


@pytest.mark.parametrize(
    "response",
    [
        Response(),
        Response(started=exec_pb2.ExecStarted(exec_id="e1")),
        Response(exited=exec_pb2.ExecExited(signal="SIGKILL", timed_out=True)),
    ],
)
def test_other_responses_are_decoded_to_their_message(response: Response) -> None:
    assert decode_response(response.SerializeToString()) == response


def test_a_response_with_a_repeated_field_is_decoded_by_protobuf() -> None:
    # The wire format allows a field twice; the last one counts.
    raw = Response(stdout=b"a").SerializeToString() + Response(stdout=b"b").SerializeToString()
    assert decode_response(raw) == Response(stdout=b"b")


@given(st.binary(max_size=12) | st.binary(max_size=12).map(lambda rest: b"\x12" + rest))
def test_any_bytes_are_decoded_as_by_protobuf_or_refused(raw: bytes) -> None:
    try:
        expected = Response.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode_response(raw)
        return
    found = decode_response(raw)
    if isinstance(found, Chunk):
        assert (found.stream, found.data) == (expected.WhichOneof("event"), getattr(expected, found.stream))
    else:
        assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
