"""`python -m tests.rig.demo`: start a rig, run the walkthrough and verify its results.

Exit codes: 0 for success, 1 if a result is not the expected one, 130 after Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

from tests.rig import BUSYBOX, Daemon, Rig, RigError

from .screen import Screen
from .shell import Shell, UnexpectedResult
from .walkthrough import IMAGE, IMAGE_FILES, Walkthrough

_LOG_TAIL = 3000
_INTERRUPTED = 130
_NODE = "gpu1"

_ON_A_REAL_HOST = """\
On a GPU host, as root, with the NVIDIA driver, Docker and the NVIDIA container toolkit (see README.md):

  make install
  systemctl enable gpudock-volumes
  systemctl enable --now gpudockd
  gpudock gpus
"""


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    screen = Screen(sys.stdout)
    begin = time.monotonic()
    try:
        _show(screen)
    except (UnexpectedResult, RigError) as error:
        screen.fail(str(error))
        return 1
    except KeyboardInterrupt:
        screen.remark("\ninterrupted; the engine, the store and their data are removed")
        return _INTERRUPTED
    screen.verified(f"all steps verified in {time.monotonic() - begin:.0f} s; nothing is left on this machine\n")
    screen.remark(_ON_A_REAL_HOST)
    return 0


def _show(screen: Screen) -> None:
    screen.title("gpudock: GPU containers, changed while they exist")
    screen.remark("Starting a private Docker Engine, an etcd, eight simulated GPUs and gpudockd …")
    with Rig(gpus=8, images=[BUSYBOX]) as rig:
        rig.images.derive(IMAGE, BUSYBOX, ['CMD ["serve"]'], IMAGE_FILES)
        daemon = rig.daemon("--node-name", _NODE, socket=rig.folder / "gpudock.sock")
        shell = Shell(screen, rig, daemon.target)
        screen.command(f"export GPUDOCK_ADDRESS={daemon.target}")
        try:
            Walkthrough(screen, shell).run()
        except UnexpectedResult as error:
            raise UnexpectedResult(f"{error}\n\nThe end of the daemon's log:\n{_log_of(daemon)}") from error


def _log_of(daemon: Daemon) -> str:
    return daemon.log_text[-_LOG_TAIL:]


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
