"""GPUs of this host, through NVIDIA's management library (NVML)."""

from gpudock_server.adapters.nvml.inventory import NvmlInventory

__all__ = ["NvmlInventory"]
