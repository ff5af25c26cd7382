"""Bind mounts of host paths at places that containers cannot replace."""

from gpudock_server.adapters.host_paths.binder import HostPathBinder, RestoreFailure
from gpudock_server.adapters.host_paths.mount_namespace import MountNamespace

__all__ = ["HostPathBinder", "MountNamespace", "RestoreFailure"]
