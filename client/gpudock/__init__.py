"""The Python client of gpudockd, which manages GPU containers on a host over gRPC.

    async with gpudock.connect() as client:
        container = await client.containers.create("train", "pytorch/pytorch", gpus=2)
        completed = await client.containers.run("train", ["nvidia-smi", "-L"])
        await client.containers.scale("train", gpus=4)

The messages are those of the contract (`gpudock.v1`); its comments describe each field.
"""

from gpudock._client import Client, connect
from gpudock._exec import Chunk, Completed, ExecExit, ExecSession
from gpudock._nodes import Comparison
from gpudock._operations import OperationCall
from gpudock._pages import Pages
from gpudock._watch import Watch, WatchEvent
from gpudock.errors import (
    Aborted,
    AlreadyExists,
    Busy,
    Cancelled,
    DeadlineExceeded,
    Exhausted,
    GpudockError,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    PreconditionFailed,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Violation,
)
from gpudock.v1.committed_image_pb2 import CommittedImage
from gpudock.v1.container_pb2 import (
    Container,
    ContainerHealth,
    ContainerSpec,
    ContainerState,
    ContainerStatus,
    GpuRequest,
    HealthCheck,
    Mount,
    PortRequest,
    RestartPolicy,
    RestartPolicyKind,
    RevisionPolicy,
    SnapshotPolicy,
    TmpfsMount,
)
from gpudock.v1.container_revision_pb2 import ContainerRevision, RevisionCause, Snapshot, SnapshotKind
from gpudock.v1.container_service_pb2 import ContainerPort, ContainerSpecEdits
from gpudock.v1.drift_pb2 import Drift, DriftKind, DriftRemedy, DriftSeverity
from gpudock.v1.error_reason_pb2 import ErrorReason
from gpudock.v1.gpu_pb2 import Gpu, GpuHealth, MigMode
from gpudock.v1.node_pb2 import Node
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
from gpudock.v1.port_claim_pb2 import PortClaim
from gpudock.v1.port_pb2 import PortBinding, PortProtocol
from gpudock.v1.registry_auth_pb2 import RegistryAuth
from gpudock.v1.volume_pb2 import Volume, VolumeBackend, VolumeRevision, VolumeRevisionCause, VolumeState

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Busy",
    "Cancelled",
    "Chunk",
    "Client",
    "CommittedImage",
    "Comparison",
    "Completed",
    "Container",
    "ContainerHealth",
    "ContainerPort",
    "ContainerRevision",
    "ContainerSpec",
    "ContainerSpecEdits",
    "ContainerState",
    "ContainerStatus",
    "DeadlineExceeded",
    "Drift",
    "DriftKind",
    "DriftRemedy",
    "DriftSeverity",
    "ErrorReason",
    "ExecExit",
    "ExecSession",
    "Exhausted",
    "Gpu",
    "GpuHealth",
    "GpuRequest",
    "GpudockError",
    "HealthCheck",
    "Internal",
    "InvalidArgument",
    "LayerCarryMethod",
    "MigMode",
    "Mount",
    "Node",
    "NotFound",
    "Operation",
    "OperationCall",
    "OperationKind",
    "OperationPlan",
    "OperationStage",
    "OperationStageState",
    "OperationState",
    "OutOfRange",
    "Pages",
    "PermissionDenied",
    "PortBinding",
    "PortClaim",
    "PortProtocol",
    "PortRequest",
    "PreconditionFailed",
    "RegistryAuth",
    "RestartPolicy",
    "RestartPolicyKind",
    "RevisionCause",
    "RevisionPolicy",
    "Snapshot",
    "SnapshotKind",
    "SnapshotPolicy",
    "SpecChange",
    "TmpfsMount",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Violation",
    "Volume",
    "VolumeBackend",
    "VolumeRevision",
    "VolumeRevisionCause",
    "VolumeState",
    "Watch",
    "WatchEvent",
    "connect",
]
