"""The coverage of the contract by a run of the everyday tests.

Every RPC must have answered: a daemon on a real engine and a real store has sent a response message. Every error reason
must have been read from an error that a server has sent. A daemon must have been killed during an operation of every
kind. `Caller` (`calls.py`) records the RPCs; the functions of tests that read an error's reason record the reason; the
report of each kill (`run_report.MOMENTS`) has the kind of the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import grpc.aio
from gpudock.v1 import (
    container_service_pb2,
    error_reason_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
    volume_service_pb2,
)

RPCS = frozenset(
    f"{service.name}/{method.name}"
    for module in (container_service_pb2, volume_service_pb2, node_service_pb2, operation_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
REASONS = frozenset(
    value.name.removeprefix("ERROR_REASON_") for value in error_reason_pb2.ErrorReason.DESCRIPTOR.values if value.number
)
# The names of records: a kind without a resource in its name is of containers.
KINDS = frozenset(
    value.name.removeprefix("OPERATION_KIND_").removesuffix("_CONTAINER")
    for value in operation_pb2.OperationKind.DESCRIPTOR.values
    if value.number
)
NOT_PROVOKED: Mapping[str, str] = {
    "PERMISSION_DENIED": "no RPC of this version ends with it: every authenticated caller may call every RPC",
}
"""Error reasons that no test can provoke, each with an explanation."""


@dataclass
class Coverage:
    """The covered part of the contract; the names in each set are those of the sets of this module."""

    rpcs: set[str] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    def merge(self, other: Mapping[str, Collection[str]]) -> None:
        """Add the coverage of another process (its `to_lists()`)."""
        self.rpcs.update(other["rpcs"])
        self.reasons.update(other["reasons"])
        self.kinds.update(other["kinds"])

    def to_lists(self) -> dict[str, list[str]]:
        """The coverage as plain lists, for another process."""
        return {"rpcs": sorted(self.rpcs), "reasons": sorted(self.reasons), "kinds": sorted(self.kinds)}

    def missing(self) -> list[str]:
        """One sentence for each name that is not covered, and for each covered reason in NOT_PROVOKED."""
        return [
            *(f"no test has received a response of {rpc} from a daemon" for rpc in sorted(RPCS - self.rpcs)),
            *(
                f"no test has received an error with the reason {reason}"
                for reason in sorted(REASONS - self.reasons - NOT_PROVOKED.keys())
            ),
            *(
                f"a test has received the reason {reason}: remove it from NOT_PROVOKED (tests/contract.py)"
                for reason in sorted(NOT_PROVOKED.keys() & self.reasons)
            ),
            *(f"no test has killed a daemon during an operation of kind {kind}" for kind in sorted(KINDS - self.kinds)),
        ]

    def __str__(self) -> str:
        reasons = REASONS - NOT_PROVOKED.keys()
        return (
            f"{len(self.rpcs & RPCS)} of {len(RPCS)} RPCs have answered, "
            f"{len(self.reasons & reasons)} of {len(reasons)} error reasons were received, "
            f"{len(self.kinds & KINDS)} of {len(KINDS)} kinds of operations were killed"
        )


COVERAGE = Coverage()
"""The coverage by this process."""


def recording_channel(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """A channel for stubs whose responses are recorded in `COVERAGE`; calls are otherwise those of `channel`."""
    return cast("grpc.aio.Channel", _RecordingChannel(channel))


class _RecordingChannel:
    """Records an RPC when one of its response messages is parsed."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A factory of multicallables, such as `unary_unary`, from which stubs are made."""
        factory = getattr(self._channel, name)

        def recording_factory(method: str, response_deserializer: Callable[[bytes], Any], **options: Any) -> Any:
            rpc = method.rpartition(".")[2]

            def parse(message: bytes) -> Any:
                COVERAGE.rpcs.add(rpc)
                return response_deserializer(message)

            return factory(method, response_deserializer=parse, **options)

        return recording_factory
