"""`python -m tests.rig`: run a rig until Ctrl-C; with --check, start one, test it and stop it."""

import argparse
import signal
import sys

from .errors import RigError
from .rig import Rig
from .self_check import check


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _run_until_interrupted(gpus: int) -> None:
    with Rig(gpus=gpus) as rig:
        _say(f"# rig {rig.id}: {gpus} GPUs; engine pid {rig.engine.pid}; enter its namespaces with")
        _say(f"#   nsenter --target {rig.namespaces.pid} --net --mount")
        _say(f"export DOCKER_HOST={rig.engine.url}")
        _say(f"export GPUDOCK_ETCD_ENDPOINTS={rig.etcd.endpoint}")
        for name, value in rig.environment.items():
            _say(f"export {name}={value}")
        _say("# Ctrl-C ends it and removes everything")
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets its background jobs ignore SIGINT
            signal.signal(number, signal.default_int_handler)
        while True:
            signal.pause()


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.rig", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="start, use and stop a rig, and verify that nothing is left"
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: 8)")
    options = parser.parse_args()
    try:
        if options.check:
            check(_say)
        else:
            _run_until_interrupted(options.gpus)
    except RigError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
