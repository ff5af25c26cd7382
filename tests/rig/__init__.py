"""The rig of tests, demo and benchmarks: a real dockerd, a real etcd and simulated GPUs, removed when it closes."""

from .daemon import Daemon
from .engine import Engine
from .engine_faults import Fault, Faults, Request
from .engine_proxy import EngineProxy
from .errors import RigError
from .etcd import Etcd
from .gpus import FakeGpus
from .http_unix import HttpStatusError
from .images import BUSYBOX, CUDA_LIKE, GLIBC, Images
from .process import Process, freeze
from .rig import Rig

__all__ = [
    "BUSYBOX",
    "CUDA_LIKE",
    "GLIBC",
    "Daemon",
    "Engine",
    "EngineProxy",
    "Etcd",
    "FakeGpus",
    "Fault",
    "Faults",
    "HttpStatusError",
    "Images",
    "Process",
    "Request",
    "Rig",
    "RigError",
    "freeze",
]
