"""A virtual machine with XFS and ext4 with project quotas, which a host may lack; see docs/testing.md."""

from .kernel import Kernel
from .machine import EXT4, FILESYSTEMS, XFS, Machine

__all__ = ["EXT4", "FILESYSTEMS", "XFS", "Kernel", "Machine"]
