"""GPUs that do not exist: the state file that the NVML double and the container hook read (nvml/gpu_state.h).

The file is the only truth: every change reads it, changes it and replaces it, under a lock, so that a test, a demo and
a shell can all hold a `FakeGpus` of the same path.
"""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import RigError

XID_EVENT = 0x8
"""nvmlEventTypeXidCriticalError, the only event type that `raise_xid` makes."""

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
    """The GPUs of one rig. A card is named by its UUID, its index as the NVML double shows it, or both."""

    def __init__(
        self, path: Path, count: int = 8, *, model: str = "NVIDIA H100 80GB HBM3", seed: str = "gpudock"
    ) -> None:
        """Writes the state of `count` idle cards to `path`, or takes up the file that is there already.

        Args:
            path: the state file; its folder is watched by the double, so it should hold little else.
            count: how many cards, at most 64.
            model: their name.
            seed: UUIDs derive from it and the index: the same in every run.
        """
        self.path = path
        with self._locked():
            if not path.exists():
                self._write(_machine_lines(), [_card_lines(index, count, model, seed) for index in range(count)])

    @property
    def uuids(self) -> list[str]:
        """The cards' UUIDs, in index order, the lost ones included."""
        return [_value(card, "uuid") for card in self._read()[1]]

    def get(self, gpu: str | int, key: str) -> str | None:
        """The value of a key, None if the card does not have it."""
        _, cards = self._read()
        return dict(cards[_find(cards, gpu)]).get(key)

    def set(self, gpu: str | int, **values: str | int | None) -> None:
        """Sets keys of a card (see `_H100` for their names); None removes one, and NVML then says NOT_SUPPORTED."""
        with self._changed(gpu) as card:
            for key, value in values.items():
                kept = [line for line in card if line[0] != key]
                card[:] = kept if value is None else [*kept, (key, str(value))]

    def lose(self, gpu: str | int, *, xid: int | None = None) -> None:
        """The card falls off the bus: NVML answers GPU_IS_LOST and the hook refuses it. `xid` (79) is raised before."""
        if xid is not None:
            self.raise_xid(gpu, xid)
        self.set(gpu, lost=1)

    def restore(self, gpu: str | int) -> None:
        """Undoes `lose`."""
        self.set(gpu, lost=None)

    def raise_xid(self, gpu: str | int, xid: int) -> None:
        """Delivers a critical XID error to every event set that has registered the card for it."""
        with self._locked():
            machine, cards = self._read()
            number = 1 + max((int(value.split()[0]) for key, value in machine if key == "event"), default=0)
            uuid_ = _value(cards[_find(cards, gpu)], "uuid")
            self._write([*machine, ("event", f"{number} {uuid_} {XID_EVENT} {xid}")], cards)

    def run_process(self, gpu: str | int, pid: int, used_bytes: int, *, kind: str = "compute") -> None:
        """Shows a process on the card (`kind` compute or graphics), its memory added to what is used."""
        with self._changed(gpu) as card:
            card.append(("process", f"{pid} {used_bytes} {kind}"))
            _add_used(card, used_bytes)

    def end_process(self, gpu: str | int, pid: int) -> None:
        """Takes a process, and the memory it used, off the card."""
        with self._changed(gpu) as card:
            for line in [line for line in card if line[0] == "process" and line[1].split()[0] == str(pid)]:
                card.remove(line)
                _add_used(card, -int(line[1].split()[1]))

    def enable_mig(self, gpu: str | int, profiles: int = 7, *, profile: str = "1g.10gb") -> list[str]:
        """Switches MIG on and makes `profiles` equal MIG devices; returns their UUIDs."""
        with self._changed(gpu) as card:
            total = int(_value(card, "memory_total_bytes")) // 8
            names = [f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, _value(card, 'uuid') + str(n))}" for n in range(profiles)]
            mine = [line for line in card if line[0] not in {"mig", "mig_mode_current", "mig_mode_pending"}]
            mine += [("mig_mode_current", "1"), ("mig_mode_pending", "1")]
            card[:] = mine + [("mig", f"{name} {total} 0 {n + 7} 0 {profile}") for n, name in enumerate(names)]
        return names

    def fail(self, function: str, code: int, *, gpu: str | int | None = None) -> None:
        """Makes an NVML function return `code` (0: no longer). `function` is the C symbol, such as nvmlInit_v2."""
        self._force(function, str(code) if code else None, gpu)

    def hang(self, function: str, *, gpu: str | int | None = None) -> None:
        """Makes an NVML function block until `fail(function, 0)`, `unhang` or `reset`."""
        self._force(function, "hang", gpu)

    def unhang(self, function: str, *, gpu: str | int | None = None) -> None:
        """Lets the calls return that `hang` holds."""
        self._force(function, None, gpu)

    def unload_driver(self) -> None:
        """Removes the file: nvmlInit and everything after it answers DRIVER_NOT_LOADED, until `reset`."""
        with self._locked():
            self.path.unlink(missing_ok=True)

    def reset(self, count: int = 8, *, model: str = "NVIDIA H100 80GB HBM3", seed: str = "gpudock") -> None:
        """Back to idle, healthy cards; event numbers go on, so that sets made before keep working."""
        with self._locked():
            machine, _ = self._read() if self.path.exists() else (_machine_lines(), [])
            last = [line for line in machine if line[0] == "event"][-1:]
            cards = [_card_lines(index, count, model, seed) for index in range(count)]
            self._write(_machine_lines() + last, cards)

    def _force(self, function: str, code: str | None, gpu: str | int | None) -> None:
        with self._locked():
            machine, cards = self._read()
            card = "" if gpu is None else f" {_value(cards[_find(cards, gpu)], 'uuid')}"
            rule = (function, card.strip())
            kept = [line for line in machine if line[0] != "fail" or _rule(line[1]) != rule]
            self._write(kept if code is None else [*kept, ("fail", f"{function} {code}{card}")], cards)

    @contextlib.contextmanager
    def _changed(self, gpu: str | int) -> Iterator[list[_Line]]:
        with self._locked():
            machine, cards = self._read()
            yield cards[_find(cards, gpu)]
            self._write(machine, cards)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Beside the folder, not in it: the double watches the folder.
        with self.path.parent.with_name(self.path.parent.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> tuple[list[_Line], list[list[_Line]]]:
        machine: list[_Line] = []
        cards: list[list[_Line]] = []
        for line in self.path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "gpu":
                cards.append([])
            elif key:
                (cards[-1] if cards else machine).append((key, value))
        return machine, cards

    def _write(self, machine: list[_Line], cards: list[list[_Line]]) -> None:
        sections = [machine, *([("gpu", ""), *card] for card in cards)]
        text = "".join(f"{key} {value}".rstrip() + "\n" for section in sections for key, value in section)
        partial = self.path.with_suffix(".new")
        partial.write_text(text)
        partial.replace(self.path)


def _machine_lines() -> list[_Line]:
    return list(_MACHINE.items())


def _card_lines(index: int, count: int, model: str, seed: str) -> list[_Line]:
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


def _find(cards: list[list[_Line]], gpu: str | int) -> int:
    for index, card in enumerate(cards):
        if gpu in {index, _value(card, "uuid")}:
            return index
    raise RigError(f"no GPU {gpu!r} in the rig")


def _add_used(card: list[_Line], difference: int) -> None:
    used = int(_value(card, "memory_used_bytes")) + difference
    card[:] = [line for line in card if line[0] != "memory_used_bytes"] + [("memory_used_bytes", str(used))]


def _rule(value: str) -> tuple[str, str]:
    """The function and the card (or "") of a line "fail FUNCTION CODE [UUID]"."""
    function, _, *card = value.split()
    return function, "".join(card)
