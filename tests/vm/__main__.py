"""`python -m tests.vm [options] -- COMMAND…`: run a command in the test VM, on each filesystem in a VM of its own.

The VMs run at the same time; their outputs are printed one after the other. The command runs in the root of the
checkout. The files of its rig, with the data of the engine, are on the filesystem. The exit code is that of the first
VM that failed. See docs/testing.md.
"""

import argparse
import compileall
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Sequence

from tests.rig import BUSYBOX, CUDA_LIKE, GLIBC, RigError
from tests.rig.builds import warm_cache
from tests.rig.images import tar_of
from tests.rig.rig import REPOSITORY

from .machine import FILESYSTEMS, Machine


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Run(threading.Thread):
    """One machine, from its start to its end.

    Attributes:
        code: the exit code of the command; 1 if the machine failed.
    """

    def __init__(self, options: argparse.Namespace, filesystems: Sequence[str]) -> None:
        """Prepare the run; `start` starts it."""
        # An interrupted process does not wait for daemon threads; the guardian of the machine removes what is left.
        super().__init__(daemon=True)
        self.code = 1
        self._options = options
        self._filesystems = filesystems
        self._output: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run(self) -> None:
        """See `Thread.run`."""
        options = self._options
        try:
            with Machine(memory_mib=options.memory, cpus=options.cpus, accelerator=options.accel) as machine:
                self.code = machine.run(
                    options.command, self._filesystems, output=self._output.put, timeout_s=options.timeout
                )
        except RigError as error:
            self._output.put(f"error: {error}\n")
        finally:
            self._output.put(None)

    def follow(self) -> None:
        """Print the output of the machine until its end."""
        while (text := self._output.get()) is not None:
            _print(text)
        self.join()


def _prepare() -> None:
    """Fill caches that each machine would otherwise fill for itself, and lose."""
    warm_cache()
    for image in (BUSYBOX, CUDA_LIKE, GLIBC):
        tar_of(image)
    for part in ("client", "server", "tests"):
        compileall.compile_dir(REPOSITORY / part, quiet=2)


def main() -> int:
    """Returns the exit code; 1 if a machine failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--on", action="append", choices=FILESYSTEMS, help="only this filesystem (default: each)")
    parser.add_argument("--in-turn", action="store_true", help="one VM for all filesystems, in turn")
    parser.add_argument("--memory", type=int, default=2048, help="MiB of each VM (default: %(default)s)")
    parser.add_argument("--cpus", type=int, help="CPUs of each VM (default: an equal share of the host's)")
    parser.add_argument("--accel", default="tcg,thread=multi", help="qemu's -accel (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for the whole run (%(default)s)")
    parser.add_argument("command", nargs="+", help="the command to run")
    options = parser.parse_args()
    began = time.monotonic()
    filesystems = tuple(options.on or FILESYSTEMS)
    together = [filesystems] if options.in_turn else [(filesystem,) for filesystem in filesystems]
    # An emulated CPU that waits for a CPU of the host makes the other CPUs of its machine wait.
    options.cpus = options.cpus or max(len(os.sched_getaffinity(0)) // len(together), 1)
    try:
        _prepare()
        runs = [_Run(options, group) for group in together]
        for run in runs:
            run.start()
        for run in runs:
            run.follow()
    except RigError as error:
        _print(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    code = next((run.code for run in runs if run.code), 0)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - began:.0f} s, {spent.ru_utime + spent.ru_stime:.0f} s of CPU time"
    _print(f"it took {took}; exit code {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
