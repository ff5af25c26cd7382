"""Conversions between the model and the messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpudock.v1 import container_pb2

from tests.stateful.model import ExpectedContainer, PastRevision, Spec, State

_PORT = container_pb2.PortRequest(container_port=80)
_NEVER = container_pb2.SNAPSHOT_POLICY_NEVER


def mounts_of(spec: Spec) -> list[container_pb2.Mount]:
    """The mounts of a spec as messages."""
    return [container_pb2.Mount(volume=volume, target=target) for target, volume in spec.mounts]


def fields_of(spec: Spec) -> dict[str, Any]:
    """The fields of a spec message."""
    return {
        "ports": [_PORT] if spec.port else [],
        "cpus": spec.cpus,
        "env": dict(spec.env),
        "labels": dict(spec.labels),
        "mounts": mounts_of(spec),
    }


def spec_of(container: container_pb2.Container) -> Spec:
    """The model's spec of a container message."""
    spec = container.spec
    return Spec(
        gpus=spec.gpus.count,
        port=bool(spec.ports),
        cpus=spec.cpus,
        env=tuple(sorted(spec.env.items())),
        labels=tuple(sorted(spec.labels.items())),
        mounts=tuple(sorted((mount.target, mount.volume) for mount in spec.mounts)),
    )


def snapshot_fields(keep: bool) -> dict[str, Any]:
    """The field of a request that says whether files are kept."""
    return {} if keep else {"snapshots": _NEVER}


def new_container(name: str, spec: Spec) -> ExpectedContainer:
    """A new container; its uid is known once it is created."""
    return ExpectedContainer(name=name, uid="", state=State.RUNNING, spec=spec, gpus=spec.gpus)


def prune_revisions(container: ExpectedContainer, keep: int) -> ExpectedContainer:
    """The container with at most `keep` revisions, including the current one."""
    after = container.copy()
    for number in sorted(after.past)[: max(0, len(after.past) - keep + 1)]:
        del after.past[number]
    return after


def restorable_revisions(container: ExpectedContainer) -> Sequence[tuple[int, PastRevision]]:
    """The earlier revisions whose files were kept."""
    return [(number, past) for number, past in sorted(container.past.items()) if past.files is not None]
