"""A virtual machine for what the host's kernel may lack: XFS and ext4 with project quotas, see docs/testing.md."""

from .kernel import Kernel
from .machine import EXT4, FILESYSTEMS, XFS, Machine

__all__ = ["EXT4", "FILESYSTEMS", "XFS", "Kernel", "Machine"]
