"""Operations and their plans as text."""

from __future__ import annotations

from collections.abc import Iterable

from gpudock._enums import enum_name
from gpudock.cli._output import View, details_only
from gpudock.cli._tables import fields, table
from gpudock.cli._text import age_text, bytes_text, moment_text, printable, seconds_text
from gpudock.cli._views import binding
from gpudock.v1.container_revision_pb2 import SnapshotKind
from gpudock.v1.operation_pb2 import (
    LayerCarryMethod,
    Operation,
    OperationKind,
    OperationPlan,
    OperationStage,
    OperationStageState,
    OperationState,
    SpecChange,
)


def _operations(items: Iterable[Operation]) -> str:
    return table(
        ("ID", "KIND", "TARGET", "STATE", "STAGE", "AGE", "NODE"),
        [
            (
                item.id,
                enum_name(OperationKind, item.kind).lower().replace("_", "-"),
                item.target.name,
                enum_name(OperationState, item.state),
                item.stage,
                age_text(item.create_time),
                item.node,
            )
            for item in items
        ],
        wrap=("KIND", "TARGET", "STAGE", "NODE"),
    )


def _operation_details(item: Operation) -> str:
    head = fields(
        (
            ("id", item.id),
            ("kind", enum_name(OperationKind, item.kind).lower().replace("_", "-")),
            ("target", item.target.name),
            ("node", item.node),
            ("state", enum_name(OperationState, item.state) + (" (cancel requested)" if item.cancel_requested else "")),
            ("message", item.message),
            ("error", f"{item.error.reason}: {item.error.message}" if item.HasField("error") else ""),
            ("created", moment_text(item.create_time)),
            ("ended", moment_text(item.end_time)),
        )
    )
    stages = table(("STAGE", "STATE", "TIME", "BYTES"), map(_stage_row, item.stages))
    return f"{head}\n\n{stages}" if item.stages else head


def plan_details(item: OperationPlan) -> str:
    """Return a line for each thing that the operation would do."""
    return fields(
        (
            ("stages", ", ".join(item.stages) or "none: nothing to do"),
            ("restarts the process", "yes" if item.restarts_process else "no"),
            ("GPUs kept", ", ".join(item.kept_gpu_uuids)),
            ("GPUs released", ", ".join(item.released_gpu_uuids)),
            ("GPUs to claim", str(item.gpus_to_claim) if item.gpus_to_claim else ""),
            ("of now", ", ".join(item.candidate_gpu_uuids)),
            ("ports to claim", ", ".join(map(binding, item.ports_to_claim))),
            (
                "files are transferred by",
                enum_name(LayerCarryMethod, item.carry_method).lower() if item.carry_method else "",
            ),
            ("files are kept as", enum_name(SnapshotKind, item.snapshot).lower() if item.snapshot else ""),
            (
                "bytes to move",
                bytes_text(item.bytes_to_move)
                + (f", available: {bytes_text(item.bytes_available)}" if item.bytes_available else "")
                if item.bytes_to_move
                else "",
            ),
            (
                "size of the files",
                f"{bytes_text(item.apparent_bytes)}, {bytes_text(item.allocated_bytes)} on the disk"
                if item.apparent_bytes
                else "",
            ),
            (
                "frozen for about",
                seconds_text(item.expected_freeze.ToMilliseconds() / 1000) if item.HasField("expected_freeze") else "",
            ),
            *(("warning", warning) for warning in item.warnings),
            ("spec", spec_changes(item.spec_changes)),
        )
    )


def spec_changes(items: Iterable[SpecChange]) -> str:
    """Return the changes of a spec as lines: `-` marks the value of now, `+` the new one."""
    lines = []
    for item in items:
        if item.HasField("old_value"):
            lines.append(f"- {printable(item.path)}: {_value(item.path, item.old_value)}")
        if item.HasField("new_value"):
            lines.append(f"+ {printable(item.path)}: {_value(item.path, item.new_value)}")
    return "\n".join(lines)


def _value(path: str, value: str) -> str:
    if path.endswith("_bytes") and value.isdecimal():
        return f"{value} ({bytes_text(int(value))})"
    return printable(value)


def stage_seconds(stage: OperationStage) -> float:
    """Return how many seconds a stage took that has ended; 0 if its times are not known."""
    begin, end = stage.start_time, stage.end_time
    return max(end.ToNanoseconds() - begin.ToNanoseconds(), 0) / 1e9 if begin.seconds and end.seconds else 0.0


def _stage_row(stage: OperationStage) -> tuple[str, str, str, str]:
    moved = bytes_text(stage.current_bytes) if stage.current_bytes else ""
    taken = seconds_text(stage_seconds(stage)) if stage.end_time.seconds else ""
    return stage.name, enum_name(OperationStageState, stage.state), taken, moved


def _no_name(_: OperationPlan) -> str:
    raise ValueError("a plan has no name")


OPERATION = View(lambda item: item.id, _operations, _operation_details)
PLAN = details_only(_no_name, plan_details)
