"""`make demo`: it shows the whole job, fails where that is not as it should be, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.rig import remains
from tests.rig.demo.shell import Shown
from tests.rig.rig import REPOSITORY

pytestmark = pytest.mark.deep

_DEADLINE_S = 240.0
_DEMO = (sys.executable, "-m", "tests.rig.demo")


def _spawn(*command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=environment
    )


def _left_by(said: str) -> list[str]:
    """What is left of the rig whose socket was shown."""
    found = re.search(rf"^\$ export GPUDOCK_ADDRESS=unix:{remains.BASE}/([^/]+)/gpudock.sock$", said, re.MULTILINE)
    assert found, said
    rig = remains.RigId.parse(found[1])
    assert rig is not None
    return remains.leftovers(rig)


def test_it_shows_the_whole_job_and_leaves_nothing() -> None:
    with _spawn(*_DEMO) as demo:
        said, _ = demo.communicate(timeout=_DEADLINE_S)
    assert demo.returncode == 0, said
    commands = re.findall(r"^\$ gpudock (?:gpus|list|(?:\w+ train\b)(?: --gpus \d)?)", said, re.MULTILINE)
    told = [command.removeprefix("$ gpudock ") for command in commands if "exec" not in command]
    wanted = "scale train --gpus 4, scale train --gpus 0, scale train --gpus 1, stop train, start train, delete train"
    assert [each for each in told if each not in {"gpus", "list"}] == ["create train", *wanted.split(", ")]
    assert told[-1] == "gpus"
    stages = re.findall(r"^(create|stop|carry|start|commit) +done +\d", said, re.MULTILINE)
    assert stages.count("carry") == 3
    assert re.findall(r"^epoch (\d)/5 on 2 GPUs", said, re.MULTILINE) == list("12345")
    assert re.findall(r"^✓ (\d of 8 GPUs|\d GPUs?), the same port|^✓ (\d) of 8", said, re.MULTILINE) == [
        ("", "6"), ("4 GPUs", ""), ("0 GPUs", ""), ("1 GPU", ""), ("", "8"), ("", "8"),
    ]  # fmt: skip
    assert "systemctl enable --now gpudockd" in said
    assert "\x1b" not in said
    assert _left_by(said) == []


def test_it_leaves_nothing_after_ctrl_c() -> None:
    with _spawn(*_DEMO) as demo:
        assert demo.stdout is not None
        said = ""
        while "epoch 1/5" not in said:
            line = demo.stdout.readline()
            assert line, said
            said += line
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=_DEADLINE_S)
    assert demo.returncode == 130, said + rest
    assert "interrupted" in rest
    assert _left_by(said) == []


def test_it_fails_where_what_it_shows_is_not_so() -> None:
    script = "import sys; from tests.rig.demo import __main__ as demo, story; story._GPUS = 9; sys.exit(demo.main())"
    with _spawn(sys.executable, "-c", script) as demo:
        said, _ = demo.communicate(timeout=_DEADLINE_S)
    assert demo.returncode == 1, said
    assert "✗ expected 9 GPUs, not 8" in said
    assert _left_by(said) == []


def test_tables_are_read_by_their_headers() -> None:
    shown = Shown("NAME   PORTS  AGE\ntrain         3s\nweb    80     4s\n", ())
    assert shown.rows == [
        {"NAME": "train", "PORTS": "", "AGE": "3s"},
        {"NAME": "web", "PORTS": "80", "AGE": "4s"},
    ]
