"""`python -m tests.rig.process_report …`: print the attributes of this process as JSON, and sleep until a signal.

With `--end` it ends with exit code 3 instead.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

# The shell that adds a program to its control group sets these.
_SHELL = {"PWD", "OLDPWD", "SHLVL", "_"}

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)


def _attributes() -> dict[str, object]:
    return {
        "name": __name__,
        "program": sys.argv[0],
        "arguments": sys.argv[1:],
        "first on the path": str(Path(sys.path[0]).resolve()),
        "folder": str(Path.cwd()),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name not in _SHELL},
        "leads its session": os.getsid(0) == os.getpgrp() == os.getpid(),
        "namespaces": {kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "mnt", "pid")},
        "groups": Path("/proc/self/cgroup").read_text(),
        "descriptors": sorted(path.name for path in Path("/proc/self/fd").iterdir()),
        "input": str(Path("/proc/self/fd/0").readlink()),
        "signals": {number.name: str(signal.getsignal(number)) for number in _SIGNALS},
        "threads": [thread.name for thread in threading.enumerate()],
        "options": [sys.flags.dev_mode, sys.flags.optimize, sys.flags.utf8_mode, sys.dont_write_bytecode],
    }


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(_attributes())}\n")
    sys.stdout.flush()
    if "--end" in sys.argv:
        sys.exit(3)
    signal.pause()
