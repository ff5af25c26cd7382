"""Host paths that containers mount, bound where no container can exchange what they lead to."""

from gpudock_server.adapters.host_paths.binder import HostPathBinder, RestoreFailure
from gpudock_server.adapters.host_paths.mount_namespace import MountNamespace

__all__ = ["HostPathBinder", "MountNamespace", "RestoreFailure"]
