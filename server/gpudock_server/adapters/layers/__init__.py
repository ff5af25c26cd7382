"""Carrying and keeping a container's writable layer on a host whose engine keeps it in overlay2 folders."""

from gpudock_server.adapters.layers.revision_backups import FolderRevisionBackupStore
from gpudock_server.adapters.layers.snapshots import OverlaySnapshotStore
from gpudock_server.adapters.layers.store import OverlayLayerStore

__all__ = ["FolderRevisionBackupStore", "OverlayLayerStore", "OverlaySnapshotStore"]
