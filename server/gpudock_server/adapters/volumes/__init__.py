"""Volumes with a size on this host: by project quota, in loop images, or none; and the copy from one to another."""

from gpudock_server.adapters.volumes.boot import AttachProblem, attach_all
from gpudock_server.adapters.volumes.copying import TreeCopier
from gpudock_server.adapters.volumes.loop import LoopBackend
from gpudock_server.adapters.volumes.plain import PlainBackend
from gpudock_server.adapters.volumes.quota import PROJECT_IDS, ProjectQuotaBackend
from gpudock_server.adapters.volumes.versions import check_versions

__all__ = [
    "PROJECT_IDS",
    "AttachProblem",
    "LoopBackend",
    "PlainBackend",
    "ProjectQuotaBackend",
    "TreeCopier",
    "attach_all",
    "check_versions",
]
