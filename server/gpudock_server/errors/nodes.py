"""Errors about nodes and their daemons."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from typing_extensions import override

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class _OtherNodeError(GpudockError):
    """The call must go to the daemon of another node."""

    code = Code.FAILED_PRECONDITION
    reason = "WRONG_NODE"
    node: str
    address: str

    @property
    @override
    def message(self) -> str:
        advice = (
            f"call its daemon at {self.address}" if self.address else "its daemon is not running or has no TCP address"
        )
        return self.template.format_map({**vars(self), "advice": advice})


@dataclass(eq=False)
class WrongNode(_OtherNodeError):
    """A container can only be changed by the daemon of its node."""

    template = "container {container!r} is on node {node!r}; {advice}"
    container: str


@dataclass(eq=False)
class OtherNodeRequested(_OtherNodeError):
    """The request names a node that another daemon serves."""

    template = "node {node!r} is served by another daemon; {advice}"


@dataclass(eq=False)
class VolumeOnOtherNode(_OtherNodeError):
    """A volume can only be changed by the daemon of its node, and mounted by containers of its node."""

    template = "volume {volume!r} is on node {node!r}; {advice}"
    volume: str


@dataclass(eq=False)
class NodeNotFound(GpudockError):
    """No running daemon serves a node of this name."""

    code = Code.NOT_FOUND
    reason = "NODE_NOT_FOUND"
    template = "node {node!r} not found"
    node: str


@dataclass(eq=False)
class Recovering(GpudockError):
    """The daemon has started and has not compared records, claims and engine yet, so it refuses mutations."""

    code = Code.UNAVAILABLE
    reason = "RECOVERING"
    template = "the daemon is recovering; mutations are refused until it has compared its records with the engine"
    retry_after = timedelta(seconds=1)


@dataclass(eq=False)
class ShuttingDown(GpudockError):
    """The daemon is stopping and accepts no new calls."""

    code = Code.UNAVAILABLE
    reason = "SHUTTING_DOWN"
    template = "the daemon is shutting down; its operations continue when it starts again"
    retry_after = timedelta(seconds=5)
