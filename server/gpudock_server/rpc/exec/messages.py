"""What a command inside a container says and how it ends."""

from __future__ import annotations

from gpudock.v1 import exec_pb2

from gpudock_server.core.exec.sessions import Exited
from gpudock_server.model.engine import ExecStream

# How a field of bytes begins: its number and wire type 2, https://protobuf.dev/programming-guides/encoding/#structure
_FIELDS = exec_pb2.ExecContainerResponse.DESCRIPTOR.fields_by_name
_TAGS = {stream: bytes([_FIELDS[stream.value].number << 3 | 2]) for stream in ExecStream}
_SEVEN_BITS = 0x7F
_CONTINUATION_BIT = 0x80


def encoded_output(stream: ExecStream, data: bytes) -> bytes:
    """ExecContainerResponse with `data` as it goes over the wire; by way of a message it would be copied twice more."""
    return b"".join((_TAGS[stream], _varint(len(data)), data))


def _varint(number: int) -> bytes:
    """https://protobuf.dev/programming-guides/encoding/#varints."""
    found = bytearray()
    while number > _SEVEN_BITS:
        found.append(number & _SEVEN_BITS | _CONTINUATION_BIT)
        number >>= 7
    found.append(number)
    return bytes(found)


def exec_exited_message(end: Exited) -> exec_pb2.ExecExited:
    """The end of a command: by a signal if it has the name of one, else with its code."""
    message = exec_pb2.ExecExited(message=end.message, timed_out=end.timed_out)
    if end.signal:
        message.signal = end.signal
    else:
        message.code = end.code
    return message
