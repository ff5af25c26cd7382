"""`python -m tests.engine.without_dac_override …`: gpudockd as root, limited to files that root's permissions open.

The user stays root: Python itself may lie below /root.
"""

import os
import sys

if __name__ == "__main__":
    capabilities = "-dac_override,-dac_read_search"
    program = [sys.executable, "-m", "gpudock_server", *sys.argv[1:]]
    drop_capabilities = ["setpriv", f"--inh-caps={capabilities}", f"--bounding-set={capabilities}"]
    os.execvp("setpriv", [*drop_capabilities, "--", *program])  # noqa: S606 - the arguments need no shell
