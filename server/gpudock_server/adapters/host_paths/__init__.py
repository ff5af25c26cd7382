"""Host paths that containers mount, bound where no container can exchange what they lead to."""

from gpudock_server.adapters.host_paths.binder import HostPathBinder, RestoreProblem
from gpudock_server.adapters.host_paths.namespace import MountNamespace

__all__ = ["HostPathBinder", "MountNamespace", "RestoreProblem"]
