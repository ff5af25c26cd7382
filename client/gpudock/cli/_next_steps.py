"""The next step after an error: the command that shows more, or that helps."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from gpudock.errors import DeadlineExceeded, GpudockError, Unavailable

# By reason; a word in braces is a key of the error's metadata. The messages of the reasons that are missing here say
# what to do themselves.
NEXT_STEPS: Mapping[str, str] = {
    "CONTAINER_BUSY": "wait for the operation: gpudock operations watch {operation_id}",
    "CONTAINER_EXISTS": "show the container: gpudock get {container}",
    "CONTAINER_GONE": "list the revisions: gpudock revisions {container}",
    "CONTAINER_NOT_FOUND": "list the containers: gpudock ps",
    "CONTAINER_NOT_PAUSED": "show its state: gpudock get {container}",
    "CONTAINER_NOT_RUNNING": "show its state: gpudock get {container}",
    "CONTAINER_PAUSED": "unpause it: gpudock unpause {container}",
    "CONTAINER_RUNNING": "stop it: gpudock stop {container}",
    "GPU_BUSY": "list the free GPUs: gpudock gpus --free",
    "GPU_EXHAUSTED": "list the GPUs and who holds them: gpudock gpus",
    "GPU_NOT_FOUND": "list the GPUs: gpudock gpus",
    "GPU_UNHEALTHY": "list the free GPUs: gpudock gpus --free",
    "IMAGE_NOT_FOUND": "pull it: --pull missing",
    "INTERNAL": "find {error_id} in the daemon's log: journalctl -u gpudockd",
    "NODE_NOT_FOUND": "show the node that is called: gpudock node",
    "OPERATION_NOT_FOUND": "list the operations: gpudock operations list",
    "OPERATION_NOT_CANCELLABLE": "show the operation: gpudock operations get {operation_id}",
    "PORT_EXHAUSTED": "list the ports and who holds them: gpudock ports",
    "PORT_IN_USE": "list the ports and who holds them: gpudock ports",
    "RESTART_REQUIRED": "let it restart: --strategy auto",
    "RESUME_TOKEN_EXPIRED": "begin again without --resume-token",
    "REVISION_IS_CURRENT": "list the revisions: gpudock revisions {container}",
    "REVISION_NOT_FOUND": "list the revisions: gpudock revisions {container}",
    "STORE_UNAVAILABLE": "show what answers: gpudock node",
    "ENGINE_UNAVAILABLE": "show what answers: gpudock node",
    "UNAUTHENTICATED": "give a token: --token-file FILE",
    "VOLUME_BUSY": "wait for the operation: gpudock operations watch {operation_id}",
    "VOLUME_EXISTS": "show the volume: gpudock volume get {volume}",
    "VOLUME_IN_USE": "show who mounts it: gpudock volume get {volume}",
    "VOLUME_NOT_FOUND": "list the volumes: gpudock volume list",
    "VOLUME_TOO_SMALL_FOR_DATA": "show its size: gpudock volume get {volume}",
}
_NO_ANSWER = "next: check that it runs: systemctl status gpudockd; or give another --address"


def next_step(error: GpudockError) -> str:
    """Return one line that says what to do about an error; empty if its message says it already."""
    if is_no_answer(error):
        return _NO_ANSWER
    values = {key: shlex.quote(value) for key, value in error.metadata.items()}
    try:
        step = NEXT_STEPS.get(error.reason, "").format_map(values)
    except KeyError:  # a daemon of another version
        return ""
    return f"next: {step}" if step else ""


def is_no_answer(error: GpudockError) -> bool:
    """Return whether the daemon could not be reached; the reason of the error is then a gRPC status."""
    return not error.answered and isinstance(error, Unavailable | DeadlineExceeded)
