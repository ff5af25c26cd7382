"""`python -m tests.vm [options] -- COMMAND…`: runs a command in the test VM, on each filesystem in a VM of its own.

They run at once, and what they print comes one after the other. The command's working folder is the checkout's root.
Its rig's files, the engine's data among them, are on the filesystem. The exit code is that of the first in order that
failed. See docs/testing.md.
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


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Run(threading.Thread):
    """One machine, from its start to its end.

    Attributes:
        code: of the command; 1 also where the machine failed.
    """

    def __init__(self, options: argparse.Namespace, filesystems: Sequence[str]) -> None:
        """Starts nothing yet."""
        # Whoever is interrupted does not wait for it: the machine's guardian ends what this one leaves.
        super().__init__(daemon=True)
        self.code = 1
        self._options = options
        self._filesystems = filesystems
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run(self) -> None:
        """See Thread."""
        options = self._options
        try:
            with Machine(memory_mib=options.memory, cpus=options.cpus, accelerator=options.accel) as machine:
                self.code = machine.run(
                    options.command, self._filesystems, output=self._said.put, timeout_s=options.timeout
                )
        except RigError as error:
            self._said.put(f"error: {error}\n")
        finally:
            self._said.put(None)

    def follow(self) -> None:
        """Says what it has said and goes on to say, until its end."""
        while (text := self._said.get()) is not None:
            _say(text)
        self.join()


def _prepare() -> None:
    """What is slow to make, and would be made again in each machine, to be lost with it."""
    warm_cache()
    for image in (BUSYBOX, CUDA_LIKE, GLIBC):
        tar_of(image)
    for part in ("client", "server", "tests"):
        compileall.compile_dir(REPOSITORY / part, quiet=2)


def main() -> int:
    """Returns the exit code; 1 also where a machine failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--on", action="append", choices=FILESYSTEMS, help="this filesystem alone (default: on each)")
    parser.add_argument("--in-turn", action="store_true", help="in one VM, one after the other, where memory is short")
    parser.add_argument("--memory", type=int, default=2048, help="MiB of each VM (default: %(default)s)")
    parser.add_argument("--cpus", type=int, help="of each VM, how many (default: its share of the host's)")
    parser.add_argument("--accel", default="tcg,thread=multi", help="qemu's -accel (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="what to run")
    options = parser.parse_args()
    began = time.monotonic()
    filesystems = tuple(options.on or FILESYSTEMS)
    together = [filesystems] if options.in_turn else [(filesystem,) for filesystem in filesystems]
    # An emulated processor that waits for one of the host's makes the others of its machine wait, too.
    options.cpus = options.cpus or max(len(os.sched_getaffinity(0)) // len(together), 1)
    try:
        _prepare()
        runs = [_Run(options, group) for group in together]
        for run in runs:
            run.start()
        for run in runs:
            run.follow()
    except RigError as error:
        _say(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    code = next((run.code for run in runs if run.code), 0)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - began:.0f} s, {spent.ru_utime + spent.ru_stime:.0f} s of the host's processors"
    _say(f"it took {took}; exit code {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
