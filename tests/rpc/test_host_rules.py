"""Specs that are impossible or harmful on a host are refused, with all their fields."""

from __future__ import annotations

from typing import Any

import pytest
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.errors import InvalidArgument
from gpudock_server.model.engine import HostCapacity
from gpudock_server.rpc.containers import requests as container_requests

from tests.calls import clone_request, update_request
from tests.rpc.request_examples import create_request, mount

GIB = 1 << 30
HOST = HostCapacity(cpus=2, memory_bytes=8 * GIB)
MOST = 2**63 - 1


def _tmpfs(target: str, size_bytes: int = 0) -> container_pb2.Mount:
    return container_pb2.Mount(tmpfs=container_pb2.TmpfsMount(size_bytes=size_bytes), target=target)


def _host(target: str) -> container_pb2.Mount:
    return container_pb2.Mount(host_path="/srv/x", target=target)


NOWHERE = ("/proc", "/sys", "/sys/fs/cgroup", "/dev", "/etc", "/proc/1", "/sys/kernel", "/dev/pts", "/dev/nvidia0")
PROGRAMS = ("/bin", "/sbin", "/lib", "/lib64", "/usr", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/libx32")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "CPUs": ({"cpus": 100.0}, "cpus"),
    "CPUs by a little": ({"cpus": 2.01}, "cpus"),
    "memory": ({"memory_bytes": MOST}, "memory_bytes"),
    "memory by a byte": ({"memory_bytes": 8 * GIB + 1}, "memory_bytes"),
    "memory too small": ({"memory_bytes": (6 << 20) - 1}, "memory_bytes"),
    "shm": ({"shm_size_bytes": MOST}, "shm_size_bytes"),
    "shm above the limit of memory": ({"memory_bytes": GIB, "shm_size_bytes": GIB + 1}, "shm_size_bytes"),
    "tmpfs larger than memory": ({"mounts": [_tmpfs("/t", 8 * GIB + 1)]}, "mounts[0].tmpfs.size_bytes"),
    "image with upper case in its first part": ({"image": "UPPER/x"}, "image"),
    "image with upper case and a tag": ({"image": "UPPER/x:1"}, "image"),
    **{f"tmpfs over {target}": ({"mounts": [_tmpfs(target)]}, "mounts[0].target") for target in NOWHERE},
    **{f"tmpfs over {target}": ({"mounts": [_tmpfs(target)]}, "mounts[0].target") for target in PROGRAMS},
    **{f"volume over {target}": ({"mounts": [mount(target=target)]}, "mounts[0].target") for target in NOWHERE},
    **{f"host path over {target}": ({"mounts": [_host(target)]}, "mounts[0].target") for target in NOWHERE},
    "tmpfs over /etc/hosts": ({"mounts": [_tmpfs("/etc/hosts")]}, "mounts[0].target"),
    "volume over /etc/resolv.conf": ({"mounts": [mount(target="/etc/resolv.conf")]}, "mounts[0].target"),
    "volume over /proc/meminfo": ({"mounts": [mount(target="/proc/meminfo")]}, "mounts[0].target"),
    "tmpfs over /": ({"mounts": [_tmpfs("/")]}, "mounts[0].target"),
}
GOOD: dict[str, dict[str, Any]] = {
    "all of the host": {"cpus": 2.0, "memory_bytes": 8 * GIB, "shm_size_bytes": 8 * GIB},
    "least": {"cpus": 0.01, "memory_bytes": 6 << 20, "shm_size_bytes": 4096},
    "below /etc": {"mounts": [mount(target="/etc/foo"), _tmpfs("/etc/ssh")]},
    "below folders of programs": {"mounts": [_tmpfs("/usr/local"), _tmpfs("/usr/bin/x"), _tmpfs("/libexec")]},
    "a volume with programs": {"mounts": [mount(target="/usr"), _host("/lib64")]},
    "/dev/shm": {"mounts": [_tmpfs("/dev/shm", GIB)]},
    "below /dev/shm": {"mounts": [mount(target="/dev/shm/x")]},
    "the host's files over the engine's": {"mounts": [_host("/etc/hosts"), _host("/etc/resolv.conf")]},
    "lxcfs": {"mounts": [_host("/proc/meminfo"), _host("/proc/cpuinfo")]},
    "names that only begin so": {"mounts": [mount(target="/system"), mount(target="/process"), mount(target="/devs")]},
    "a registry in upper case": {"image": "Example.COM/x"},
    "a registry with a port": {"image": "REG:5000/x"},
    "localhost": {"image": "localhost/x"},
}


def _violations(call: Any, request: Any) -> list[str]:
    with pytest.raises(InvalidArgument) as refused:
        call(request, HOST)
    return [violation.field for violation in refused.value.violations]


@pytest.mark.parametrize(("fields", "field"), BAD.values(), ids=BAD.keys())
def test_impossible_specs_are_refused(fields: dict[str, Any], field: str) -> None:
    assert _violations(container_requests.create, create_request(**fields)) == [f"spec.{field}"]
    # An update to the same value is refused too.
    (name,) = {path for path in fields if field.startswith(path)}
    changed = {key: value for key, value in fields.items() if key in (name, "memory_bytes")}
    assert _violations(container_requests.update, update_request("c", ",".join(changed), **changed)) == [
        f"spec.{field}"
    ]
    if name != "image":
        assert _violations(container_requests.clone, clone_request("c", "d", ",".join(changed), **changed)) == [
            f"spec.{field}"
        ]
    if name in ("cpus", "memory_bytes", "shm_size_bytes"):
        scale = container_service_pb2.ScaleContainerRequest(name="c", **changed)
        assert _violations(container_requests.scale, scale) == [field]


@pytest.mark.parametrize("fields", GOOD.values(), ids=GOOD.keys())
def test_possible_specs_are_accepted(fields: dict[str, Any]) -> None:
    container_requests.create(create_request(**fields), HOST)


def test_all_violations_are_reported_together() -> None:
    request = create_request(
        image="UPPER/x", cpus=100.0, memory_bytes=MOST, shm_size_bytes=MOST, mounts=[_tmpfs("/proc"), _tmpfs("/", MOST)]
    )
    assert _violations(container_requests.create, request) == [
        "spec.image",
        "spec.cpus",
        "spec.memory_bytes",
        "spec.shm_size_bytes",
        "spec.mounts[0].target",
        "spec.mounts[1].tmpfs.size_bytes",
        "spec.mounts[1].target",
    ]


def test_the_messages_say_what_would_be_right() -> None:
    with pytest.raises(InvalidArgument) as refused:
        container_requests.create(create_request(cpus=100.0, mounts=[_tmpfs("/sys/fs/cgroup"), _tmpfs("/usr")]), HOST)
    said = [violation.description for violation in refused.value.violations]
    assert said == [
        "is 100; must be 0 or 0.01 to 2, the number of CPUs of this node",
        "must not be /sys/fs/cgroup, below /sys, where the kernel shows devices and control groups",
        "must not be /usr, which holds the image's programs or libraries; an empty file system there hides them",
    ]
