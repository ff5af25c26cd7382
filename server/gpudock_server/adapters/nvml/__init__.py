"""The cards of this host, as NVIDIA's management library shows them."""

from gpudock_server.adapters.nvml.inventory import NvmlInventory

__all__ = ["NvmlInventory"]
