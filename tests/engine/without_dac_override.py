"""`python -m tests.engine.without_dac_override …`: gpudockd as a root that may open only what root's files are open to.

No other user will do: Python itself may lie below /root.
"""

import os
import sys

if __name__ == "__main__":
    capabilities = "-dac_override,-dac_read_search"
    program = [sys.executable, "-m", "gpudock_server", *sys.argv[1:]]
    give_up = ["setpriv", f"--inh-caps={capabilities}", f"--bounding-set={capabilities}"]
    os.execvp("setpriv", [*give_up, "--", *program])  # noqa: S606 - no shell is wanted
