"""The rig itself: what a container with GPUs sees, the namespaces, the daemon's launcher, and that nothing stays."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aetcd
import pytest
from aiodocker import Docker

from tests.rig import BUSYBOX, CUDA_LIKE, GLIBC, HttpStatusError, Rig, RigError, cleanup
from tests.rig.gpus import FakeGpus
from tests.rig.rig import REPOSITORY
from tests.rig.self_check import run_container

pytestmark = pytest.mark.deep

HEALTHY_DAEMON = """
import argparse, concurrent.futures, grpc, os, sys
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
parser = argparse.ArgumentParser()
for flag in ("--docker-host", "--etcd-endpoints", "--socket", "--state-dir"):
    parser.add_argument(flag)
options, rest = parser.parse_known_args()
print(options.docker_host, options.etcd_endpoints, rest, os.environ["EXTRA"], flush=True)
server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port("unix:" + options.socket)
server.start()
server.wait_for_termination()
"""


def test_a_container_sees_the_cards_it_was_given_and_no_other(rig: Rig) -> None:
    seen = run_container(rig, "cd /dev; ls -1 nvidia*; cat nvidia5; cat nvidia0", rig.gpus.uuids[4:6])
    assert seen.splitlines() == [
        "nvidia4",
        "nvidia5",
        "nvidiactl",
        "cat: can't open 'nvidia5': No such device or address",
        "cat: can't open 'nvidia0': No such file or directory",
    ]


def test_a_container_without_cards_sees_none_whatever_its_image_says(rig: Rig) -> None:
    seen = run_container(rig, "ls /dev/nvidia*; echo $NVIDIA_VISIBLE_DEVICES; cat /data/*", image=CUDA_LIKE)
    assert seen.splitlines() == ["ls: /dev/nvidia*: No such file or directory", "all", "from the image"]


def test_cards_that_are_unknown_or_lost_keep_a_container_from_starting(rig: Rig, gpus: FakeGpus) -> None:
    with pytest.raises(HttpStatusError, match="nvidia-container-cli: device error: GPU-nope: unknown device"):
        run_container(rig, "true", ["GPU-nope"])
    gpus.lose(3)
    with pytest.raises(HttpStatusError, match="nvml error: gpu is lost"):
        run_container(rig, "true", gpus.uuids[3:4])


def test_the_glibc_image_has_tools_for_trees_and_python(rig: Rig) -> None:
    script = "cd /etc && setfattr -n user.a -v b group && getfattr --only-values -n user.a group && id -un user"
    seen = run_container(rig, f"{script} && python3 -c 'import json, socket, tarfile; print(1)'", image=GLIBC)
    assert seen.splitlines() == ["buser", "1"]


def test_images_are_derived_by_changes_and_files(rig: Rig) -> None:
    rig.images.derive(
        "gpudock/derived:test", BUSYBOX, ["ENV A=b", "USER user"], {"/usr/bin/hello": b"#!/bin/sh\nid -u"}
    )
    assert run_container(rig, "echo $A; hello", image="gpudock/derived:test").splitlines() == ["b", "1000"]


async def test_published_ports_answer_inside_the_namespace_alone(rig: Rig, docker: Docker) -> None:
    config: dict[str, Any] = {
        "Image": BUSYBOX,
        "Cmd": ["sh", "-c", "echo hello > /index.html; exec httpd -f -p 80 -h /"],
        "ExposedPorts": {"80/tcp": {}},  # without, this engine ignores the binding and says nothing
        "HostConfig": {"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "28080"}]}},
    }
    container = await docker.containers.create(config)
    await container.start()
    ask = "until busybox wget -qO- http://127.0.0.1:28080; do :; done"  # a container that started need not listen yet
    assert rig.run("timeout", "10", "sh", "-c", ask).stdout == "hello\n"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", 28080), timeout=2):
        pass
    assert "docker0" in rig.run("ip", "-brief", "link").stdout


async def test_an_engine_that_was_killed_comes_back_with_its_containers(rig: Rig, docker: Docker) -> None:
    container = await docker.containers.create({"Image": BUSYBOX, "Cmd": ["sleep", "1000"], "StopSignal": "SIGKILL"})
    await container.start()
    rig.engine.kill9()
    assert not rig.engine.answers()
    rig.engine.start()
    assert rig.engine.call("GET", f"/containers/{container.id}/json")["State"]["Status"] == "exited"


def test_an_engine_that_gave_up_on_its_containerd_is_started_again(rig: Rig) -> None:
    rig.engine.stop()
    rig.engine.launch()
    pidfile = rig.engine.folder / "exec/containerd/containerd.pid"
    rig.engine.process.wait_until(lambda: pidfile.exists() and bool(pidfile.read_text()))
    first = rig.engine.pid
    os.kill(int(pidfile.read_text()), signal.SIGSTOP)
    rig.engine.await_ready()
    assert rig.engine.answers()
    assert rig.engine.pid != first
    assert "timeout waiting for containerd to start" in rig.engine.log_text


async def test_etcd_keeps_its_data_when_it_is_killed(rig: Rig) -> None:
    async with aetcd.Client(host=rig.etcd.host, port=rig.etcd.port, timeout=5) as client:
        await client.put(b"/rig/key", b"value")
    rig.etcd.kill9()
    rig.etcd.start()
    async with aetcd.Client(host=rig.etcd.host, port=rig.etcd.port, timeout=5) as client:
        assert (await client.get(b"/rig/key")).value == b"value"
        await client.delete(b"/rig/key")


def test_a_daemon_is_launched_in_the_namespaces_with_everything_it_needs(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "healthy_daemon.py").write_text(HEALTHY_DAEMON)
    environment = {"PYTHONPATH": str(tmp_path), "EXTRA": "yes"}
    daemon = rig.daemon("--flag", module="healthy_daemon", environment=environment)
    try:
        assert daemon.log_text == f"{rig.engine.url} {rig.etcd.endpoint} ['--flag'] yes\n"
        for kind in ("net", "mnt"):
            assert (
                Path(f"/proc/{daemon.pid}/ns/{kind}").readlink() == Path(f"/proc/{rig.engine.pid}/ns/{kind}").readlink()
            )
        assert daemon.kill9() == -signal.SIGKILL
        assert not daemon.serving()
    finally:
        daemon.stop()


def test_a_daemon_that_does_not_come_up_is_reported_with_its_log(rig: Rig) -> None:
    with pytest.raises(RigError, match="No module named no_such_module"):
        rig.daemon(module="no_such_module")


def test_a_forked_daemon_is_like_one_with_an_interpreter_of_its_own(rig: Rig) -> None:
    own, forked = _process_report(rig, fresh=True), _process_report(rig, fresh=False)
    assert own["environment"]["GPUDOCK_TEST_SITTER"] == "yes"
    assert forked == own


def _process_report(rig: Rig, *, fresh: bool) -> Any:
    """What a process says of itself that is then killed, without what is no other's."""
    module, environment = "tests.rig.process_report", {"GPUDOCK_TEST_SITTER": "yes"}
    process = rig.daemon("--flag", module=module, environment=environment, fresh=fresh, serving=False)
    process.process.wait_until(lambda: process.log_text.endswith("\n"))
    assert process.running
    with pytest.raises(RigError, match=r"has not ended after 0\.1 s"):
        process.wait(0.1)
    assert process.kill9() == -signal.SIGKILL
    assert process.returncode == -signal.SIGKILL
    report = json.loads(process.log_text)
    report["arguments"].remove(str(process.socket))
    report["arguments"].remove(str(process.state_dir))
    return report


def test_the_end_of_a_forked_daemon_is_told(rig: Rig) -> None:
    processes = [rig.daemon("--end", module="tests.rig.process_report", serving=False) for _ in range(3)]
    assert [process.wait() for process in processes] == [3, 3, 3]
    assert {json.loads(process.log_text)["leads its session"] for process in processes} == {True}
    assert len({process.pid for process in processes}) == 3


@pytest.mark.parametrize("guarded", [True, False])
def test_nothing_stays_of_a_rig_whose_owner_was_killed(*, guarded: bool) -> None:
    script = f"""
import os, signal
from tests.rig import Rig
rig = Rig(gpus=1, images=["{BUSYBOX}"], forks=True).start()
rig.daemon()
container = rig.engine.call("POST", "/containers/create", send={{"Image": "{BUSYBOX}", "Cmd": ["sleep", "9999"]}})["Id"]
rig.engine.call("POST", f"/containers/{{container}}/start")
rig.engine.call("POST", f"/containers/{{container}}/pause")
print(rig.id, rig.guardian_pid, flush=True)
if not {guarded}:
    os.kill(rig.guardian_pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name, guardian = done.stdout.split()
    rig = cleanup.RigId.parse(name)
    assert rig is not None
    if guarded:
        _await_end(int(guardian))
    else:
        assert len(cleanup.processes_of(rig)) > 3
        assert cleanup.sweep() == []
    assert cleanup.leftovers(rig) == []


def _await_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([descriptor], [], [], 30)
    os.close(descriptor)
