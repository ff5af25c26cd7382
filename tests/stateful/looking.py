"""What there really is: files read from the layers themselves, cards from the engine, claims and records by the API."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.invariants import cards_of
from tests.rig import Rig
from tests.stateful.model import GROUP, Files


def files_of(layer: Path) -> Files:
    """What a writable layer, or a snapshot of one, says of the files that the test plays with."""
    found: Files = {}
    work = layer / "work"
    if work.is_dir():
        for entry in os.scandir(work):
            found[entry.name] = Path(entry.path).read_text()
    group = layer / GROUP.lstrip("/")
    if group.is_symlink() or group.exists():
        status = group.lstat()
        assert stat.S_ISCHR(status.st_mode), "an image's file can only be deleted here"
        assert status.st_rdev == 0
        found[GROUP] = "deleted"
    return found


@dataclass(frozen=True)
class EngineSide:
    """Our engine containers, inspected, by name of the container that they belong to."""

    by_name: dict[str, list[dict[str, Any]]]

    @classmethod
    def look(cls, rig: Rig, node: str) -> EngineSide:
        """All of a node's."""
        by_name: dict[str, list[dict[str, Any]]] = {}
        query = {"all": "1", "filters": f'{{"label":["gpudock.node={node}"]}}'}
        for listed in rig.engine.call("GET", "/containers/json", query=query):
            one = rig.engine.call("GET", f"/containers/{listed['Id']}/json")
            by_name.setdefault(one["Config"]["Labels"]["gpudock.name"], []).append(one)
        return cls(by_name)

    @property
    def running_cards(self) -> dict[str, list[str]]:
        """Who has each card in the engine, of those that run: one name, or something is wrong."""
        users: dict[str, list[str]] = {}
        for name, ones in self.by_name.items():
            for one in ones:
                if one["State"]["Running"]:
                    for uuid in cards_of(one):
                        users.setdefault(uuid, []).append(name)
        return users


def upper_of(inspected: dict[str, Any]) -> Path:
    """The writable layer of an engine container."""
    return Path(inspected["GraphDriver"]["Data"]["UpperDir"])
