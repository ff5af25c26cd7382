"""Simulated GPUs: the state file that the NVML double and the container hook read (nvml/gpu_state.h).

The file is the only state: every change reads, changes and replaces it under a lock, so that several processes can use
a `FakeGpus` of the same path.
"""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import RigError

XID_EVENT = 0x8
"""nvmlEventTypeXidCriticalError, the type of the events of `raise_xid`."""

_BUSES = ["19", "3B", "4C", "5D", "9B", "BB", "CB", "DB"]
_MACHINE = {"driver_version": "550.54.15", "nvml_version": "12.550.54.15", "cuda_driver_version": "12040"}
_H100 = {
    "memory_total_bytes": 85520809984,
    "memory_used_bytes": 0,
    "memory_reserved_bytes": 0,
    "utilization_gpu_percent": 0,
    "utilization_memory_percent": 0,
    "temperature_celsius": 31,
    "power_milliwatts": 71000,
    "power_limit_milliwatts": 700000,
    "persistence_mode": 1,
    "compute_mode": 0,
    "compute_capability": "9.0",
    "pci_device_id": "0x233010DE",
    "pci_subsystem_id": "0x16C110DE",
    "mig_mode_current": 0,
    "mig_mode_pending": 0,
    "nvlink_group": 0,
    "nvlink_count": 18,
    "ecc_corrected": 0,
    "ecc_uncorrected": 0,
    "remapped_rows": "0 0 0 0",
}

_Line = tuple[str, str]


class FakeGpus:
    """The GPUs of one rig. A `gpu` argument is a UUID or an index."""

    def __init__(
        self, path: Path, count: int = 8, *, model: str = "NVIDIA H100 80GB HBM3", seed: str = "gpudock"
    ) -> None:
        """Write the state of `count` idle GPUs to `path`, or use the file that exists already.

        Args:
            path: the state file; the double watches its folder, which should have few other files.
            count: the number of GPUs, at most 64.
            model: the name of the GPUs.
            seed: UUIDs are derived from it and the index, so that they are the same in every run.
        """
        self.path = path
        with self._lock():
            if not path.exists():
                self._write(_machine_lines(), [_gpu_lines(index, count, model, seed) for index in range(count)])

    @property
    def uuids(self) -> list[str]:
        """The UUIDs of all GPUs, also of lost ones, in the order of their indexes."""
        return [_value(lines, "uuid") for lines in self._read()[1]]

    def get(self, gpu: str | int, key: str) -> str | None:
        """The value of a key of a GPU; None if the GPU does not have it."""
        _, gpus = self._read()
        return dict(gpus[_find(gpus, gpu)]).get(key)

    def set(self, gpu: str | int, **values: str | int | None) -> None:
        """Set keys of a GPU (`_H100` has their names); None removes a key, and NVML then answers NOT_SUPPORTED."""
        with self._edit(gpu) as lines:
            for key, value in values.items():
                kept = [line for line in lines if line[0] != key]
                lines[:] = kept if value is None else [*kept, (key, str(value))]

    def lose(self, gpu: str | int, *, xid: int | None = None) -> None:
        """Make NVML answer GPU_IS_LOST and the hook refuse the GPU. `xid`, such as 79, is raised before."""
        if xid is not None:
            self.raise_xid(gpu, xid)
        self.set(gpu, lost=1)

    def restore(self, gpu: str | int) -> None:
        """Undo `lose`."""
        self.set(gpu, lost=None)

    def raise_xid(self, gpu: str | int, xid: int) -> None:
        """Deliver a critical XID error to every event set that has registered the GPU for it."""
        with self._lock():
            machine, gpus = self._read()
            number = 1 + max((int(value.split()[0]) for key, value in machine if key == "event"), default=0)
            uuid_ = _value(gpus[_find(gpus, gpu)], "uuid")
            self._write([*machine, ("event", f"{number} {uuid_} {XID_EVENT} {xid}")], gpus)

    def run_process(self, gpu: str | int, pid: int, used_bytes: int, *, kind: str = "compute") -> None:
        """Add a process (`kind` compute or graphics) to the GPU, and its memory to the used memory."""
        with self._edit(gpu) as lines:
            lines.append(("process", f"{pid} {used_bytes} {kind}"))
            _add_used(lines, used_bytes)

    def end_process(self, gpu: str | int, pid: int) -> None:
        """Remove a process and its memory from the GPU."""
        with self._edit(gpu) as lines:
            for line in [line for line in lines if line[0] == "process" and line[1].split()[0] == str(pid)]:
                lines.remove(line)
                _add_used(lines, -int(line[1].split()[1]))

    def enable_mig(self, gpu: str | int, profiles: int = 7, *, profile: str = "1g.10gb") -> list[str]:
        """Enable MIG with `profiles` equal MIG devices; returns their UUIDs."""
        with self._edit(gpu) as lines:
            total = int(_value(lines, "memory_total_bytes")) // 8
            names = [f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, _value(lines, 'uuid') + str(n))}" for n in range(profiles)]
            mine = [line for line in lines if line[0] not in {"mig", "mig_mode_current", "mig_mode_pending"}]
            mine += [("mig_mode_current", "1"), ("mig_mode_pending", "1")]
            lines[:] = mine + [("mig", f"{name} {total} 0 {n + 7} 0 {profile}") for n, name in enumerate(names)]
        return names

    def fail(self, function: str, code: int, *, gpu: str | int | None = None) -> None:
        """Make an NVML function return `code`; 0 undoes that. `function` is the C symbol, such as nvmlInit_v2."""
        self._force(function, str(code) if code else None, gpu)

    def hang(self, function: str, *, gpu: str | int | None = None) -> None:
        """Make an NVML function block until `fail(function, 0)`, `unhang` or `reset`."""
        self._force(function, "hang", gpu)

    def unhang(self, function: str, *, gpu: str | int | None = None) -> None:
        """Let the calls return that `hang` blocks."""
        self._force(function, None, gpu)

    def unload_driver(self) -> None:
        """Remove the file: nvmlInit and all other functions answer DRIVER_NOT_LOADED until `reset`."""
        with self._lock():
            self.path.unlink(missing_ok=True)

    def reset(self, count: int = 8, *, model: str = "NVIDIA H100 80GB HBM3", seed: str = "gpudock") -> None:
        """Make all GPUs idle and healthy. Event numbers continue, so that existing event sets keep working."""
        with self._lock():
            machine, _ = self._read() if self.path.exists() else (_machine_lines(), [])
            last = [line for line in machine if line[0] == "event"][-1:]
            gpus = [_gpu_lines(index, count, model, seed) for index in range(count)]
            self._write(_machine_lines() + last, gpus)

    def _force(self, function: str, code: str | None, gpu: str | int | None) -> None:
        with self._lock():
            machine, gpus = self._read()
            suffix = "" if gpu is None else f" {_value(gpus[_find(gpus, gpu)], 'uuid')}"
            rule = (function, suffix.strip())
            kept = [line for line in machine if line[0] != "fail" or _rule(line[1]) != rule]
            self._write(kept if code is None else [*kept, ("fail", f"{function} {code}{suffix}")], gpus)

    @contextlib.contextmanager
    def _edit(self, gpu: str | int) -> Iterator[list[_Line]]:
        with self._lock():
            machine, gpus = self._read()
            yield gpus[_find(gpus, gpu)]
            self._write(machine, gpus)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # Next to the folder and not in it, because the double watches the folder.
        with self.path.parent.with_name(self.path.parent.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> tuple[list[_Line], list[list[_Line]]]:
        machine: list[_Line] = []
        gpus: list[list[_Line]] = []
        for line in self.path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "gpu":
                gpus.append([])
            elif key:
                (gpus[-1] if gpus else machine).append((key, value))
        return machine, gpus

    def _write(self, machine: list[_Line], gpus: list[list[_Line]]) -> None:
        sections = [machine, *([("gpu", ""), *lines] for lines in gpus)]
        text = "".join(f"{key} {value}".rstrip() + "\n" for section in sections for key, value in section)
        partial = self.path.with_suffix(".new")
        partial.write_text(text)
        partial.replace(self.path)


def _machine_lines() -> list[_Line]:
    return list(_MACHINE.items())


def _gpu_lines(index: int, count: int, model: str, seed: str) -> list[_Line]:
    bus = _BUSES[index] if count <= len(_BUSES) else f"{0x10 + index:02X}"
    identity = {
        "uuid": f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'{seed}/{index}')}",
        "name": model,
        "serial": f"165222{index:07d}",
        "minor_number": index,
        "pci_bus_id": f"00000000:{bus}:00.0",
        "numa_node": int(index >= (count + 1) // 2),
    }
    return [(key, str(value)) for key, value in {**identity, **_H100}.items()]


def _value(lines: list[_Line], key: str) -> str:
    return dict(lines)[key]


def _find(gpus: list[list[_Line]], gpu: str | int) -> int:
    for index, lines in enumerate(gpus):
        if gpu in {index, _value(lines, "uuid")}:
            return index
    raise RigError(f"no GPU {gpu!r} in the rig")


def _add_used(lines: list[_Line], difference: int) -> None:
    used = int(_value(lines, "memory_used_bytes")) + difference
    lines[:] = [line for line in lines if line[0] != "memory_used_bytes"] + [("memory_used_bytes", str(used))]


def _rule(value: str) -> tuple[str, str]:
    """The function and the UUID (or "") of a line "fail FUNCTION CODE [UUID]"."""
    function, _, *uuids = value.split()
    return function, "".join(uuids)
