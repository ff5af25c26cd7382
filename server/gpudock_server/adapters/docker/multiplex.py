"""Two outputs on one wire: the engine's frames of stdout and stderr.

Each frame is a header of eight bytes (stream, three zeros, length as a big-endian uint32) and its payload:
https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
"""

from __future__ import annotations

import struct
from typing import Final

from gpudock_server.model.engine import ExecStream

HEADER_BYTES: Final = 8
_HEADER = struct.Struct(">BxxxL")
_STDOUT: Final = 1


class Frames:
    """Takes blocks as they come off the wire, cut anywhere, and gives back what each output said."""

    def __init__(self) -> None:
        self._stream = ExecStream.STDOUT
        self._missing = 0

    def take(self, block: memoryview) -> tuple[list[tuple[ExecStream, bytes]], int]:
        """The chunks in `block`, and how many of its bytes were used: all but the beginning of a header at its end.

        Neighbouring frames of one stream become one chunk; order is kept. Payloads are copied, once.
        """
        chunks: list[tuple[ExecStream, bytes]] = []
        stream = self._stream
        pieces = [block[: self._missing]]
        position = len(pieces[0])
        missing = self._missing - position
        last = len(block) - HEADER_BYTES
        # Short, for a gigabyte has a hundred thousand frames.
        while position <= last and not missing:
            kind, length = _HEADER.unpack_from(block, position)
            # 2 is stderr; 3 is the engine's own error, which belongs there too.
            speaker = ExecStream.STDOUT if kind <= _STDOUT else ExecStream.STDERR
            if speaker is not stream:
                chunks.append((stream, b"".join(pieces)))
                stream, pieces = speaker, []
            position += HEADER_BYTES
            piece = block[position : position + length]
            pieces.append(piece)
            position += len(piece)
            missing = length - len(piece)
        chunks.append((stream, b"".join(pieces)))
        self._stream, self._missing = stream, missing
        return [chunk for chunk in chunks if chunk[1]], position
