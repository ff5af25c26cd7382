"""The network and mount namespaces of the rig, held open by a process that sleeps.

The private dockerd runs in them, so that its bridge, its iptables rules, its mounts and the ports of its containers do
not exist on the host. A daemon under test must run in them too, to have the ports and mounts of that dockerd. The
sleeping process keeps the namespaces while dockerd is killed and started. Process ids are shared with the host, so that
the process ids that the engine reports are valid everywhere.
"""

from pathlib import Path

from .process import ProcessGroup

# A separate /run hides the host's containerd, whose socket dockerd would use, its docker plugins and its iptables lock;
# what shims leave there is lost with it. A separate /etc/docker hides the host's daemon.json and gets the engine's key.
_SET_UP = """
ip link set lo up
mkdir -p /etc/docker
mount -t tmpfs -o mode=755 rig /run
mount -t tmpfs -o mode=755 rig /etc/docker
: > "$1"
exec sleep infinity
"""


class Namespaces:
    """The namespaces, made at construction; they end with the last process in them."""

    def __init__(self, folder: Path, processes: ProcessGroup) -> None:
        ready = folder / "namespaces.ready"
        unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
        set_up = ["/bin/sh", "-euc", _SET_UP, "sh", str(ready)]
        self.holder = processes.start([*unshare, *set_up], log=folder / "namespaces.log")
        self.holder.wait_until(ready.exists)

    @property
    def pid(self) -> int:
        """The id of the sleeping process: `nsenter -t PID -n -m` enters the namespaces."""
        return self.holder.pid

    def enter(self, *, mount: bool = True) -> list[str]:
        """The command prefix that runs a program in the network namespace and, with `mount`, in the mount namespace."""
        return ["nsenter", "--target", str(self.pid), "--net", *(["--mount"] if mount else []), "--"]
