"""Volume backends of this host (project quotas, loop images, plain), and copies between them."""

from gpudock_server.adapters.host.program_versions import check_versions
from gpudock_server.adapters.volumes.boot import AttachFailure, attach_all_volumes
from gpudock_server.adapters.volumes.copier import MirrorVolumeCopier
from gpudock_server.adapters.volumes.loop import LoopBackend
from gpudock_server.adapters.volumes.plain import PlainBackend
from gpudock_server.adapters.volumes.quota import PROJECT_IDS, ProjectQuotaBackend

__all__ = [
    "PROJECT_IDS",
    "AttachFailure",
    "LoopBackend",
    "MirrorVolumeCopier",
    "PlainBackend",
    "ProjectQuotaBackend",
    "attach_all_volumes",
    "check_versions",
]
