"""The commands of README.md on a host: install, start by ExecStart of the unit, a call, upgrade and uninstall."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.install.host import Host
from tests.install.wheelhouse import environment
from tests.rig import BUSYBOX, Rig
from tests.rig.daemon import Daemon
from tests.rig.engine import SYSTEM_PATH
from tests.rig.rig import REPOSITORY

pytestmark = pytest.mark.deep

_CONFIG = "/etc/gpudock/gpudockd.toml"
_SECTION = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Installing on a GPU host")[2]
# The commands of the list, without its indentation.
_COMMANDS = [
    re.sub(r"^ +", "", text, flags=re.MULTILINE)
    for text in re.findall(r"^ *```sh\n(.*?)^ *```", _SECTION.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
]


@pytest.fixture
def host(clean_engine: Rig, tmp_path: Path) -> Iterator[Host]:
    target = Host(clean_engine, tmp_path, environment())
    yield target
    target.close()


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_work(host: Host, rig: Rig) -> None:
    # Existing settings of an operator are kept.
    operators = f'etcd_endpoints = ["{rig.etcd.endpoint}"]\netcd_prefix = "/installed/"\nnode_name = "installed"\n'
    host.run(f"mkdir -p /etc/gpudock; printf '%s' '{operators}' >{_CONFIG}")
    install, upgrade, uninstall = _COMMANDS

    output = host.run(install)
    assert f"kept       {_CONFIG}, which was changed" in output
    assert "installed  /opt/gpudock" in output
    calls = ["daemon-reload", "enable gpudock-volumes", "enable --now gpudockd"]
    assert _calls(host) == ["apt install etcd-server make python3-venv", *(f"systemctl {call}" for call in calls)]
    units = "/usr/local/lib/systemd/system/gpudockd.service /usr/local/lib/systemd/system/gpudock-volumes.service"
    assert host.run(f"systemd-analyze verify --man=no --recursive-errors=no {units}") == ""

    assert host.start_unit("gpudock-volumes").wait() == 0
    process = host.start_unit("gpudockd")
    daemon = Daemon(process, host.path("/run/gpudock/gpudock.sock"), host.path("/var/lib/gpudock"))
    daemon.await_serving()
    host.run(f"gpudock create train {BUSYBOX} --gpus 2 -- sleep infinity", PATH=SYSTEM_PATH)
    assert "train" in host.run("gpudock gpus", PATH=SYSTEM_PATH)

    output = host.run(upgrade)
    assert "unchanged  /opt/gpudock" in output
    assert host.path(_CONFIG).read_text() == operators
    assert _calls(host) == ["systemctl restart gpudockd"]

    host.run("mv /run/systemd /run/away")
    assert "left out   systemctl daemon-reload" in host.run(upgrade.partition("systemctl")[0])
    host.run("mv /usr/bin/systemctl /usr/bin/away")
    assert "left out   gpudockd.service gpudock-volumes.service" in host.run(upgrade.partition("systemctl")[0])
    host.run("mv /run/away /run/systemd; mv /usr/bin/away /usr/bin/systemctl")
    assert _calls(host) == []

    # systemctl would have ended it; the engine keeps the container.
    assert daemon.stop() == 0
    output = host.run(uninstall)
    assert _calls(host) == [
        "systemctl --quiet disable --now gpudockd.service",
        "systemctl --quiet disable --now gpudock-volumes.service",
        "systemctl daemon-reload",
    ]
    assert re.findall(r"^kept +([\w/.]+)", output, re.MULTILINE) == [_CONFIG, "/etc/gpudock", "/var/lib/gpudock"]
    left = host.run("find /etc /opt /usr/local /var/lib -not -type d -newer /run/ready").split()
    assert [path for path in left if not path.startswith("/var/lib/gpudock/")] == [_CONFIG]
    [container] = rig.engine.call("GET", "/containers/json")
    assert container["State"] == "running"


def _calls(host: Host) -> list[str]:
    """The commands that apt and systemctl got since the previous call."""
    path = host.path("/run/calls")
    calls = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return calls
