"""How much longer than usual to wait: an emulated machine (tests/vm) is many times slower than a real one."""

import os

PATIENCE = float(os.environ.get("GPUDOCK_RIG_PATIENCE", "1"))
"""What deadlines are multiplied with."""
