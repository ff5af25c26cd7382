"""What a run of the everyday tests must meet of the contract, and what it has met.

Every RPC must have answered: a daemon on a real engine and a real store has sent a message of its response. Every
reason of an error must have been read from an error that a server has sent. During an operation of every kind, a daemon
must have been killed. `Caller` (`calls.py`) notes the RPCs; the functions of tests that read an error's reason note it;
the report of each kill (`run_report.MOMENTS`) has the kind of the operation.
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
# As records have them: of containers where they say nothing else.
KINDS = frozenset(
    value.name.removeprefix("OPERATION_KIND_").removesuffix("_CONTAINER")
    for value in operation_pb2.OperationKind.DESCRIPTOR.values
    if value.number
)
NOT_PROVOKED: Mapping[str, str] = {
    "PERMISSION_DENIED": "no RPC of this version answers with it: who is authenticated may call every RPC",
}
"""Reasons that no test can provoke, each with why."""


@dataclass
class Coverage:
    """What was met of the contract; each set is of names as in the sets of this module."""

    rpcs: set[str] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    def merge(self, other: Mapping[str, Collection[str]]) -> None:
        """Add what another process has met (its `to_lists()`)."""
        self.rpcs.update(other["rpcs"])
        self.reasons.update(other["reasons"])
        self.kinds.update(other["kinds"])

    def to_lists(self) -> dict[str, list[str]]:
        """For another process."""
        return {"rpcs": sorted(self.rpcs), "reasons": sorted(self.reasons), "kinds": sorted(self.kinds)}

    def missing(self) -> list[str]:
        """One sentence for each thing that was not met, or that is excused and was met."""
        return [
            *(f"no test has had an answer of {rpc} from a daemon" for rpc in sorted(RPCS - self.rpcs)),
            *(
                f"no test has seen an error with the reason {reason}"
                for reason in sorted(REASONS - self.reasons - NOT_PROVOKED.keys())
            ),
            *(
                f"the reason {reason} was seen: remove it from NOT_PROVOKED (tests/contract.py)"
                for reason in sorted(NOT_PROVOKED.keys() & self.reasons)
            ),
            *(f"no test has killed a daemon during an operation of kind {kind}" for kind in sorted(KINDS - self.kinds)),
        ]

    def __str__(self) -> str:
        reasons = REASONS - NOT_PROVOKED.keys()
        return (
            f"{len(self.rpcs & RPCS)} of {len(RPCS)} RPCs have answered, "
            f"{len(self.reasons & reasons)} of {len(reasons)} reasons of errors were seen, "
            f"{len(self.kinds & KINDS)} of {len(KINDS)} kinds of operations were killed"
        )


COVERAGE = Coverage()
"""What this process has met."""


def recording_channel(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """The channel, for stubs whose answers are noted in `COVERAGE`; in all else, calls are the channel's own."""
    return cast("grpc.aio.Channel", _RecordingChannel(channel))


class _RecordingChannel:
    """Notes an RPC when a message of its response is parsed, which is after it has arrived."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """One of `unary_unary`, `unary_stream` and the others, of which stubs are made."""
        multicallable = getattr(self._channel, name)

        def noted(method: str, response_deserializer: Callable[[bytes], Any], **others: Any) -> Any:
            rpc = method.rpartition(".")[2]

            def parse(message: bytes) -> Any:
                COVERAGE.rpcs.add(rpc)
                return response_deserializer(message)

            return multicallable(method, response_deserializer=parse, **others)

        return noted
