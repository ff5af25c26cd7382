"""`make demo` shows all steps, fails if a result is not the expected one, and leaves nothing on the machine."""

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
    # Without variables of `make test`, and without those that change the output.
    left_out = ("MAKE", "MFLAGS", "FORCE_COLOR")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment = inherited | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=environment
    )


def _leftovers(output: str) -> list[str]:
    """What is left of the rig in whose folder the socket of the output is."""
    found = re.search(rf"^\$ export GPUDOCK_ADDRESS=unix:{cleanup.BASE}/([^/]+)/gpudock.sock$", output, re.MULTILINE)
    assert found, output
    rig = cleanup.RigId.parse(found[1])
    assert rig is not None
    return cleanup.leftovers(rig)


def test_the_demo_shows_all_steps_and_leaves_nothing() -> None:
    with _spawn("make", "demo") as demo:
        output, _ = demo.communicate(timeout=limit(_DEADLINE_S))
    assert demo.returncode == 0, output
    assert re.match(r"make demo: installs \w.*; starts a private Docker Engine, an etcd, eight simulated GPUs", output)
    commands = re.findall(r"^\$ gpudock (?:gpus|list|(?:\w+ train\b)(?: --gpus \d)?)", output, re.MULTILINE)
    shown = [command.removeprefix("$ gpudock ") for command in commands if "exec" not in command]
    expected = "scale train --gpus 4, scale train --gpus 0, scale train --gpus 1, stop train, start train, delete train"
    assert [command for command in shown if command not in {"gpus", "list"}] == ["create train", *expected.split(", ")]
    assert shown[-1] == "gpus"
    stages = re.findall(r"^(create|stop|carry|start|commit) +done +\d", output, re.MULTILINE)
    assert stages.count("carry") == 3
    assert re.findall(r"^epoch (\d)/5 on 2 GPUs", output, re.MULTILINE) == list("12345")
    assert re.findall(r"^✓ (\d of 8 GPUs|\d GPUs?), the same port|^✓ (\d) of 8", output, re.MULTILINE) == [
        ("", "6"), ("4 GPUs", ""), ("0 GPUs", ""), ("1 GPU", ""), ("", "8"), ("", "8"),
    ]  # fmt: skip
    assert "systemctl enable --now gpudockd" in output
    assert "\x1b" not in output
    assert _leftovers(output) == []
    # The picture in README.md shows this demo.
    fixed = [line for line in _drawn_lines() if line.startswith(("$ ", "── ", "NAME ", "INDEX ", "epoch "))]
    assert len(fixed) > 10
    assert set(fixed) - set(output.splitlines()) == set(), "docs/demo.svg shows an older demo; run `make demo-svg`"


def test_the_picture_has_no_details_of_the_machine_that_made_it() -> None:
    words = " ".join(_drawn_lines()).split()
    assert socket.gethostname() not in words
    assert [word for word in words if word.startswith("/")] == []
    assert re.findall(r"https?:[^\s\"<]*", _PICTURE.read_text()) == [
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",
    ]


def test_the_demo_announces_what_it_installs(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "make", "wc"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    words = ["/usr/bin/env", f"PATH={tmp_path}", "scripts/announce-demo"]

    def announced(stamp: str) -> str:
        return subprocess.run([*words, stamp], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout

    assert announced("README.md").startswith("make demo: installs nothing; starts")
    output = announced("elsewhere/.installed")
    assert re.match(
        r"make demo: installs .*\bgcc\b.* \(with apt-get\) and Python packages in elsewhere; starts", output
    )
    assert output.count("\n") == 1


def _drawn_lines() -> list[str]:
    """The lines of text in the picture."""
    lines: defaultdict[str, str] = defaultdict(str)
    for line, text in re.findall(r'<text [^>]*clip-path="([^"]+)"[^>]*>([^<]*)', _PICTURE.read_text()):
        lines[line] += html.unescape(text).replace("\xa0", " ")
    return [line.rstrip() for line in lines.values()]


def test_an_interrupted_demo_leaves_nothing() -> None:
    with _spawn(*_DEMO) as demo:
        assert demo.stdout is not None
        output = ""
        while "epoch 1/5" not in output:
            line = demo.stdout.readline()
            assert line, output
            output += line
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=limit(_DEADLINE_S))
    assert demo.returncode == 130, output + rest
    assert "interrupted" in rest
    assert _leftovers(output) == []


def test_the_demo_fails_if_a_result_is_not_the_expected_one() -> None:
    script = (
        "import sys; from tests.rig.demo import __main__ as demo, walkthrough; "
        "walkthrough._GPUS = 9; sys.exit(demo.main())"
    )
    with _spawn(sys.executable, "-c", script) as demo:
        output, _ = demo.communicate(timeout=limit(_DEADLINE_S))
    assert demo.returncode == 1, output
    assert "✗ expected 9 GPUs, not 8" in output
    assert _leftovers(output) == []


def test_table_cells_are_read_by_the_positions_of_headers() -> None:
    shown = CommandOutput("NAME   PORTS  AGE\ntrain         3s\nweb    80     4s\n", ())
    assert shown.rows == [
        {"NAME": "train", "PORTS": "", "AGE": "3s"},
        {"NAME": "web", "PORTS": "80", "AGE": "4s"},
    ]
