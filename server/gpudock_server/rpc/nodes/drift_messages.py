"""Drift: what does not agree, and what is done about it."""

from __future__ import annotations

from gpudock.v1 import drift_pb2

from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy, DriftSeverity
from gpudock_server.rpc.timestamps import timestamp

KINDS = {kind: drift_pb2.DriftKind.Value(f"DRIFT_KIND_{kind.name}") for kind in DriftKind}
SEVERITIES = {severity: drift_pb2.DriftSeverity.Value(f"DRIFT_SEVERITY_{severity.name}") for severity in DriftSeverity}
REMEDIES = {remedy: drift_pb2.DriftRemedy.Value(f"DRIFT_REMEDY_{remedy.name}") for remedy in DriftRemedy}


def drift_message(found: Drift) -> drift_pb2.Drift:
    """One finding."""
    return drift_pb2.Drift(
        kind=KINDS[found.kind],
        severity=SEVERITIES[found.severity],
        remedy=REMEDIES[found.remedy],
        message=found.message,
        plan=found.plan,
        container=found.container,
        container_uid=found.uid,
        engine_id=found.engine_id,
        engine_name=found.engine_name,
        claim=found.claim,
        operation_id=found.operation_id,
        other_container=found.other,
        key=found.key,
        expected=found.expected,
        actual=found.actual,
        since_time=timestamp(found.since),
        due_time=timestamp(found.due_time),
        volume=found.volume,
    )
