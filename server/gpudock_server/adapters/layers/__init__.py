"""Transfers, snapshots and backups of writable layers in folders of Docker's overlay2 driver."""

from gpudock_server.adapters.layers.revision_backups import FolderRevisionBackupStore
from gpudock_server.adapters.layers.snapshots import OverlaySnapshotStore
from gpudock_server.adapters.layers.store import OverlayLayerStore

__all__ = ["FolderRevisionBackupStore", "OverlayLayerStore", "OverlaySnapshotStore"]
