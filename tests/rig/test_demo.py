"""`make demo`: it shows the whole job, fails where that is not as it should be, and leaves nothing behind."""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.rig import cleanup
from tests.rig.demo.shell import CommandOutput
from tests.rig.rig import REPOSITORY

from .patience import limit

pytestmark = pytest.mark.deep

_DEADLINE_S = 240.0
_PICTURE = REPOSITORY / "docs" / "demo.svg"
_DEMO = (sys.executable, "-m", "tests.rig.demo")


def _spawn(*command: str) -> subprocess.Popen[str]:
    # Not what `make test` tells its own children, nor what changes the output.
    others = ("MAKE", "MFLAGS", "FORCE_COLOR")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment = inherited | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=environment
    )


def _left_by(said: str) -> list[str]:
    """What is left of the rig whose socket was shown."""
    found = re.search(rf"^\$ export GPUDOCK_ADDRESS=unix:{cleanup.BASE}/([^/]+)/gpudock.sock$", said, re.MULTILINE)
    assert found, said
    rig = cleanup.RigId.parse(found[1])
    assert rig is not None
    return cleanup.leftovers(rig)


def test_it_shows_the_whole_job_and_leaves_nothing() -> None:
    with _spawn("make", "demo") as demo:
        said, _ = demo.communicate(timeout=limit(_DEADLINE_S))
    assert demo.returncode == 0, said
    assert re.match(r"make demo: installs \w.*; starts a private Docker Engine, an etcd, eight simulated GPUs", said)
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
    # The picture in README.md is of this demo.
    fixed = [line for line in _drawn_lines() if line.startswith(("$ ", "── ", "NAME ", "INDEX ", "epoch "))]
    assert len(fixed) > 10
    assert set(fixed) - set(said.splitlines()) == set(), "docs/demo.svg is of another demo: make demo-svg"


def test_the_picture_tells_nothing_of_the_machine_that_it_was_made_on() -> None:
    words = " ".join(_drawn_lines()).split()
    assert socket.gethostname() not in words
    assert [word for word in words if word.startswith("/")] == []
    assert re.findall(r"https?:[^\s\"<]*", _PICTURE.read_text()) == [
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",
    ]


def test_it_says_what_it_is_about_to_install(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "make", "wc"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    words = ["/usr/bin/env", f"PATH={tmp_path}", "scripts/announce-demo"]

    def announced(stamp: str) -> str:
        return subprocess.run([*words, stamp], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout

    assert announced("README.md").startswith("make demo: installs nothing; starts")
    said = announced("elsewhere/.installed")
    assert re.match(r"make demo: installs .*\bgcc\b.* \(with apt-get\) and Python packages in elsewhere; starts", said)
    assert said.count("\n") == 1


def _drawn_lines() -> list[str]:
    """The lines of the picture."""
    lines: defaultdict[str, str] = defaultdict(str)
    for line, text in re.findall(r'<text [^>]*clip-path="([^"]+)"[^>]*>([^<]*)', _PICTURE.read_text()):
        lines[line] += html.unescape(text).replace("\xa0", " ")
    return [line.rstrip() for line in lines.values()]


def test_it_leaves_nothing_after_ctrl_c() -> None:
    with _spawn(*_DEMO) as demo:
        assert demo.stdout is not None
        said = ""
        while "epoch 1/5" not in said:
            line = demo.stdout.readline()
            assert line, said
            said += line
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=limit(_DEADLINE_S))
    assert demo.returncode == 130, said + rest
    assert "interrupted" in rest
    assert _left_by(said) == []


def test_it_fails_where_what_it_shows_is_not_so() -> None:
    script = (
        "import sys; from tests.rig.demo import __main__ as demo, walkthrough; "
        "walkthrough._GPUS = 9; sys.exit(demo.main())"
    )
    with _spawn(sys.executable, "-c", script) as demo:
        said, _ = demo.communicate(timeout=limit(_DEADLINE_S))
    assert demo.returncode == 1, said
    assert "✗ expected 9 GPUs, not 8" in said
    assert _left_by(said) == []


def test_tables_are_read_by_their_headers() -> None:
    shown = CommandOutput("NAME   PORTS  AGE\ntrain         3s\nweb    80     4s\n", ())
    assert shown.rows == [
        {"NAME": "train", "PORTS": "", "AGE": "3s"},
        {"NAME": "web", "PORTS": "80", "AGE": "4s"},
    ]
