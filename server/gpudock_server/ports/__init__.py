"""Interfaces that core uses: engine, store, GPUs, host paths, layers, snapshots, volumes.

Adapters implement them. A method raises only the domain errors that its docstring or that of its protocol names. The
adapter limits the time of every call.
"""

from gpudock_server.ports.engine import Engine, ExecSession
from gpudock_server.ports.host import DiskUsage, GpuInventory, HostUsage, PortProbe, ProcessControl
from gpudock_server.ports.host_paths import HostPaths
from gpudock_server.ports.layers import CommitCost, LayerPair, LayerStore, LayerTransferPlan
from gpudock_server.ports.progress import Progress
from gpudock_server.ports.revision_backups import RevisionBackupStore
from gpudock_server.ports.snapshots import LayerTooLarge, SnapshotPlan, SnapshotStore
from gpudock_server.ports.store import (
    ContainerView,
    Page,
    RevisionView,
    Store,
    StoreConflict,
    StoreEvent,
    StoreUsage,
    UnreadableKey,
    Versioned,
    VolumeDetails,
    VolumeView,
)
from gpudock_server.ports.volumes import ShrinkNeedsCopy, VolumeBackend, VolumeCopier

__all__ = [
    "CommitCost",
    "ContainerView",
    "DiskUsage",
    "Engine",
    "ExecSession",
    "GpuInventory",
    "HostPaths",
    "HostUsage",
    "LayerPair",
    "LayerStore",
    "LayerTooLarge",
    "LayerTransferPlan",
    "Page",
    "PortProbe",
    "ProcessControl",
    "Progress",
    "RevisionBackupStore",
    "RevisionView",
    "ShrinkNeedsCopy",
    "SnapshotPlan",
    "SnapshotStore",
    "Store",
    "StoreConflict",
    "StoreEvent",
    "StoreUsage",
    "UnreadableKey",
    "Versioned",
    "VolumeBackend",
    "VolumeCopier",
    "VolumeDetails",
    "VolumeView",
]
