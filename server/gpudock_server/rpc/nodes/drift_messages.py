"""Converts drift to messages."""

from __future__ import annotations

from gpudock.v1 import drift_pb2

from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy, DriftSeverity
from gpudock_server.rpc.timestamps import timestamp

KINDS = {kind: drift_pb2.DriftKind.Value(f"DRIFT_KIND_{kind.name}") for kind in DriftKind}
SEVERITIES = {severity: drift_pb2.DriftSeverity.Value(f"DRIFT_SEVERITY_{severity.name}") for severity in DriftSeverity}
REMEDIES = {remedy: drift_pb2.DriftRemedy.Value(f"DRIFT_REMEDY_{remedy.name}") for remedy in DriftRemedy}


def drift_message(drift: Drift) -> drift_pb2.Drift:
    """One difference between records, claims and engine."""
    return drift_pb2.Drift(
        kind=KINDS[drift.kind],
        severity=SEVERITIES[drift.severity],
        remedy=REMEDIES[drift.remedy],
        message=drift.message,
        plan=drift.plan,
        container=drift.container,
        container_uid=drift.uid,
        engine_id=drift.engine_id,
        engine_name=drift.engine_name,
        claim=drift.claim,
        operation_id=drift.operation_id,
        other_container=drift.other,
        key=drift.key,
        expected=drift.expected,
        actual=drift.actual,
        since_time=timestamp(drift.since),
        due_time=timestamp(drift.due_time),
        volume=drift.volume,
    )
