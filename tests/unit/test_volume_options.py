"""hazard: options of an engine volume that give access to the host."""

from __future__ import annotations

import pytest
from gpudock_server.adapters.docker.volume_options import hazard, is_anonymous


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"type": "none", "o": "bind", "device": "/etc"}, "bind mount of host path '/etc'"),
        ({"type": "tmpfs", "o": "size=1m, BIND", "device": "/etc"}, "bind mount of host path '/etc'"),
        ({"type": "nfs", "o": "addr=192.0.2.1,rbind", "device": "/"}, "bind mount of host path '/'"),
        ({"type": "tmpfs", "o": "remount", "device": "/"}, "bind mount of host path '/'"),
        ({"type": "ext4", "device": "/dev/sda1"}, "host device '/dev/sda1' with filesystem type 'ext4'"),
        ({"type": "overlay", "device": "overlay", "o": "lowerdir=/etc"}, "filesystem type 'overlay'"),
        ({"type": "proc", "device": "proc"}, "filesystem type 'proc'"),
        ({"device": "/srv"}, "host device '/srv'"),
        ({"mountpoint": "/etc"}, "'mountpoint' is not on the list of safe options"),
    ],
)
def test_options_with_access_to_the_host_are_hazards(options: dict[str, str], expected: str) -> None:
    assert expected in hazard("local", options)


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("local", {}),
        ("local", {"size": "10G"}),
        ("local", {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,uid=7"}),
        ("local", {"type": "nfs4", "device": ":/export", "o": "addr=192.0.2.1,rw"}),
        ("local", {"type": "cifs", "device": "//server/share", "o": "addr=server,username=a"}),
        ("plugin", {"type": "none", "o": "bind", "device": "/etc"}),
    ],
)
def test_options_without_access_to_the_host_are_no_hazard(driver: str, options: dict[str, str]) -> None:
    assert hazard(driver, options) == ""


def test_which_volumes_are_anonymous() -> None:
    assert is_anonymous("0" * 64, {})
    assert is_anonymous("a", {"com.docker.volume.anonymous": ""})
    assert not is_anonymous("0" * 63, {"a": "b"})
