"""The rig's own network and mount namespaces, held open by a process that sleeps.

The private dockerd runs in them, so its bridge, its iptables rules, its mounts and its containers' ports are invisible
to the host; a daemon under test must run there too, to see the ports and the volumes' mounts as dockerd does. The
holder keeps them while dockerd itself is killed and started again. Process ids are shared with the host on purpose: the
pids that the engine reports are valid everywhere.
"""

from pathlib import Path

from .process import ProcessGroup

# An own /run hides a host's containerd (which dockerd would use if it saw its socket), its docker plugins and the
# iptables lock, and takes along what shims leave there; an own /etc/docker hides its daemon.json and takes our key.
_SET_UP = """
ip link set lo up
mkdir -p /etc/docker
mount -t tmpfs -o mode=755 rig /run
mount -t tmpfs -o mode=755 rig /etc/docker
: > "$1"
exec sleep infinity
"""


class Namespaces:
    """Makes the namespaces at construction; they end with the holder, or with the last process inside."""

    def __init__(self, folder: Path, processes: ProcessGroup) -> None:
        ready = folder / "namespaces.ready"
        unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
        set_up = ["/bin/sh", "-euc", _SET_UP, "sh", str(ready)]
        self.holder = processes.start([*unshare, *set_up], log=folder / "namespaces.log")
        self.holder.wait_until(ready.exists)

    @property
    def pid(self) -> int:
        """The holder's pid: `nsenter -t PID -n -m` enters."""
        return self.holder.pid

    def enter(self, *, mount: bool = True) -> list[str]:
        """The command prefix that runs a program inside the network namespace and, with `mount`, the mount one."""
        return ["nsenter", "--target", str(self.pid), "--net", *(["--mount"] if mount else []), "--"]
