"""Facts about the machine and the versions of a run, which its figures depend on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.rig import Rig
from tests.rig.cleanup import BASE


def facts(rig: Rig, docker: str) -> dict[str, Any]:
    """Hardware, versions, commit and load at the start of a run. `docker` is the version of the command line."""
    engine = rig.engine.call("GET", "/version")
    info = rig.engine.call("GET", "/info")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": info["MemTotal"],
        "kernel": platform.release(),
        "system": info["OperatingSystem"],
        "filesystem": _filesystem(BASE),
        "storage_driver": info["Driver"],
        "cgroup_version": info.get("CgroupVersion", ""),
        "engine": engine["Version"],
        "docker_cli": docker,
        "etcd": _etcd(rig),
        "etcd_fsync": "--unsafe-no-fsync" not in rig.etcd.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("gpudock", "grpcio", "protobuf", "aiodocker", "aetcd")},
        "load_before": load(),
    }


def load() -> tuple[float, float, float]:
    """Processes that ran or waited for a CPU, over the last 1, 5 and 15 minutes."""
    return os.getloadavg()


def heading(machine: Mapping[str, Any]) -> str:
    """The facts as text of a few lines."""
    failed = "".join(f"\n{name} could not be measured." for name in machine["failed"])
    return (
        f"{machine['date']}, `{machine['command']}`, commit {machine['commit']}:\n"
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_bytes'] / 1e9:.0f} GB,"
        f" kernel {machine['kernel']}, {machine['filesystem']}, cgroup v{machine['cgroup_version']},\n"
        f"engine {machine['engine']}, docker CLI {machine['docker_cli']}, etcd {machine['etcd']}"
        f" (fsync {'on' if machine['etcd_fsync'] else 'off'}), Python {machine['python']};"
        f" load {machine['load_before'][0]:.1f} before and {machine['load_after'][0]:.1f} after.{failed}"
    )


def _commit() -> str:
    """The commit of the code; `unknown` outside of a repository."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], check=False, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    # Results are no change of the code.
    changed = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return commit + (" with changes that are not committed" if changed else "") or "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _filesystem(path: Path) -> str:
    findmnt = shutil.which("findmnt")
    if findmnt is None:
        return "unknown"
    words = [findmnt, "--noheadings", "--output", "FSTYPE", "--target", str(path)]
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


def _etcd(rig: Rig) -> str:
    first = subprocess.run([rig.etcd.argv[0], "--version"], check=True, capture_output=True, text=True).stdout
    return first.splitlines()[0].rpartition(" ")[2]
