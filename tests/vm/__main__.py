"""`python -m tests.vm [options] -- COMMAND…`: boots the test VM and runs a command in it, once for each filesystem.

The command's working folder is the checkout's root. Its rig's files, the engine's data among them, are on the
filesystem in turn. The exit code is that of the first run that failed. See docs/testing.md.
"""

import argparse
import resource
import sys
import time

from tests.rig import BUSYBOX, CUDA_LIKE, GLIBC, RigError
from tests.rig.builds import warm_cache
from tests.rig.images import tar_of

from .machine import FILESYSTEMS, Machine


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    """Returns the exit code; 1 also where the machine failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--on", action="append", choices=FILESYSTEMS, help="this filesystem alone (default: on each)")
    parser.add_argument("--memory", type=int, default=2048, help="MiB (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--accel", default="tcg,thread=multi", help="qemu's -accel (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="what to run")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        # Inside, the same would take minutes.
        warm_cache()
        for image in (BUSYBOX, CUDA_LIKE, GLIBC):
            tar_of(image)
        with Machine(memory_mib=options.memory, cpus=options.cpus, accelerator=options.accel) as machine:
            filesystems = tuple(options.on or FILESYSTEMS)
            code = machine.run(options.command, filesystems, output=_say, timeout_s=options.timeout)
    except RigError as error:
        _say(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - began:.0f} s, {spent.ru_utime + spent.ru_stime:.0f} s of the host's processors"
    _say(f"the VM took {took}; exit code {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
