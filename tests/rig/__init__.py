"""The rig that tests, demo and benchmarks run on: a real dockerd and etcd, simulated GPUs. It removes all of them when it ends."""

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
