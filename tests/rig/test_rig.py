"""The rig: GPUs in containers, images, namespaces, the start of daemons, and the removal of everything."""

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
from tests.rig.patience import limit
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


def test_a_container_has_only_the_devices_of_its_gpus(rig: Rig) -> None:
    output = run_container(rig, "cd /dev; ls -1 nvidia*; cat nvidia5; cat nvidia0", rig.gpus.uuids[4:6])
    assert output.splitlines() == [
        "nvidia4",
        "nvidia5",
        "nvidiactl",
        "cat: can't open 'nvidia5': No such device or address",
        "cat: can't open 'nvidia0': No such file or directory",
    ]


def test_a_container_without_gpus_has_no_devices_even_if_its_image_asks_for_all(rig: Rig) -> None:
    output = run_container(rig, "ls /dev/nvidia*; echo $NVIDIA_VISIBLE_DEVICES; cat /data/*", image=CUDA_LIKE)
    assert output.splitlines() == ["ls: /dev/nvidia*: No such file or directory", "all", "from the image"]


def test_a_container_with_an_unknown_or_lost_gpu_does_not_start(rig: Rig, gpus: FakeGpus) -> None:
    with pytest.raises(HttpStatusError, match="nvidia-container-cli: device error: GPU-nope: unknown device"):
        run_container(rig, "true", ["GPU-nope"])
    gpus.lose(3)
    with pytest.raises(HttpStatusError, match="nvml error: gpu is lost"):
        run_container(rig, "true", gpus.uuids[3:4])


def test_the_glibc_image_has_attribute_tools_and_python(rig: Rig) -> None:
    script = "cd /etc && setfattr -n user.a -v b group && getfattr --only-values -n user.a group && id -un user"
    output = run_container(rig, f"{script} && python3 -c 'import json, socket, tarfile; print(1)'", image=GLIBC)
    assert output.splitlines() == ["buser", "1"]


def test_derived_images_have_the_changes_and_files(rig: Rig) -> None:
    rig.images.derive(
        "gpudock/derived:test", BUSYBOX, ["ENV A=b", "USER user"], {"/usr/bin/hello": b"#!/bin/sh\nid -u"}
    )
    assert run_container(rig, "echo $A; hello", image="gpudock/derived:test").splitlines() == ["b", "1000"]


async def test_published_ports_answer_only_in_the_network_namespace(rig: Rig, docker: Docker) -> None:
    config: dict[str, Any] = {
        "Image": BUSYBOX,
        "Cmd": ["sh", "-c", "echo hello > /index.html; exec httpd -f -p 80 -h /"],
        "ExposedPorts": {"80/tcp": {}},  # without it, this engine ignores the binding
        "HostConfig": {"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "28080"}]}},
    }
    container = await docker.containers.create(config)
    await container.start()
    command = "until busybox wget -qO- http://127.0.0.1:28080; do :; done"  # it may not listen yet
    assert rig.run("timeout", f"{limit(10):g}", "sh", "-c", command).stdout == "hello\n"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", 28080), timeout=2):
        pass
    assert "docker0" in rig.run("ip", "-brief", "link").stdout


async def test_a_killed_engine_has_its_containers_after_a_start(rig: Rig, docker: Docker) -> None:
    container = await docker.containers.create({"Image": BUSYBOX, "Cmd": ["sleep", "1000"], "StopSignal": "SIGKILL"})
    await container.start()
    rig.engine.kill9()
    assert not rig.engine.answers()
    rig.engine.start()
    assert rig.engine.call("GET", f"/containers/{container.id}/json")["State"]["Status"] == "exited"


def test_the_engine_is_started_again_after_it_timed_out_waiting_for_containerd(rig: Rig) -> None:
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


async def test_killed_etcd_keeps_its_data(rig: Rig) -> None:
    async with aetcd.Client(host=rig.etcd.host, port=rig.etcd.port, timeout=5) as client:
        await client.put(b"/rig/key", b"value")
    rig.etcd.kill9()
    rig.etcd.start()
    async with aetcd.Client(host=rig.etcd.host, port=rig.etcd.port, timeout=5) as client:
        assert (await client.get(b"/rig/key")).value == b"value"
        await client.delete(b"/rig/key")


def test_a_daemon_is_started_in_the_namespaces_with_flags_and_environment(rig: Rig, tmp_path: Path) -> None:
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


def test_the_error_about_a_daemon_that_does_not_start_has_its_log(rig: Rig) -> None:
    with pytest.raises(RigError, match="No module named no_such_module"):
        rig.daemon(module="no_such_module")


def test_a_forked_daemon_equals_one_with_a_new_interpreter(rig: Rig) -> None:
    started, forked = _process_report(rig, fresh=True), _process_report(rig, fresh=False)
    assert started["environment"]["GPUDOCK_TEST_REPORT"] == "yes"
    assert forked == started


def _process_report(rig: Rig, *, fresh: bool) -> Any:
    """The report of a process, which is then killed, without the paths that no other process has."""
    module, environment = "tests.rig.process_report", {"GPUDOCK_TEST_REPORT": "yes"}
    daemon = rig.daemon("--flag", module=module, environment=environment, fresh=fresh, serving=False)
    daemon.process.wait_until(lambda: daemon.log_text.endswith("\n"))
    assert daemon.running
    with pytest.raises(RigError, match=r"has not ended after 0\.1 s"):
        daemon.wait(0.1)
    assert daemon.kill9() == -signal.SIGKILL
    assert daemon.returncode == -signal.SIGKILL
    report = json.loads(daemon.log_text)
    report["arguments"].remove(str(daemon.socket))
    report["arguments"].remove(str(daemon.state_dir))
    return report


def test_the_exit_code_of_a_forked_daemon_is_reported(rig: Rig) -> None:
    daemons = [rig.daemon("--end", module="tests.rig.process_report", serving=False) for _ in range(3)]
    assert [daemon.wait() for daemon in daemons] == [3, 3, 3]
    assert {json.loads(daemon.log_text)["leads its session"] for daemon in daemons} == {True}
    assert len({daemon.pid for daemon in daemons}) == 3


@pytest.mark.parametrize("guarded", [True, False])
def test_a_rig_is_removed_after_its_owner_was_killed(*, guarded: bool) -> None:
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
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=limit(60))
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
    ended, _, _ = select.select([descriptor], [], [], limit(30))
    os.close(descriptor)
    assert ended, f"process {pid} has not ended"
