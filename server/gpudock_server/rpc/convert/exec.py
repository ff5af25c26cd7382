"""What a command inside a container says and how it ends."""

from __future__ import annotations

from gpudock.v1 import exec_pb2

from gpudock_server.core.exec_sessions import Exited


def exited_message(end: Exited) -> exec_pb2.ExecExited:
    """The end of a command: by a signal if it has the name of one, else with its code."""
    message = exec_pb2.ExecExited(message=end.message, timed_out=end.timed_out)
    if end.signal:
        message.signal = end.signal
    else:
        message.code = end.code
    return message
