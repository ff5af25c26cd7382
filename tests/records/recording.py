"""A recording: the keys in etcd when a gpudockd was killed, its answers, and a part of its engine.

A recording is a folder with four JSON files, with a line for each key, written by `recorder.py` and never changed:

- `etcd.json`: every key with its value. A value of compact JSON is written as JSON, any other as text. Keys are without
  the prefix of the installation.
- `answers.json`: the answers of a daemon of that version to RPCs that read; see `answers.py`.
- `engine.json`: the paths of the folders of engine and daemon, and the engine containers and volumes of some
  interrupted operations, as the engine's inspect calls show them.
- `disk.json`: files with records on the disk, of some volumes and of a container: below `volumes` in the state folder,
  and below the node's folder of snapshots.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig import Etcd, http_unix

RECORDINGS = Path(__file__).parent
_NAMES = ("etcd", "answers", "engine", "disk")
_LEASE_SECONDS = 3600


@dataclass(frozen=True)
class Stored:
    """A value in etcd. `leased`: it is deleted when its lease ends."""

    value: bytes
    leased: bool


@dataclass(frozen=True)
class Recording:
    """The content of a recording; see the docstring of the module. Keys are without the prefix."""

    keys: Mapping[str, Stored]
    answers: Mapping[str, Any]
    engine: Mapping[str, Any]
    disk: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> Recording:
        """Read the recording in a folder."""
        etcd, answers, engine, disk = (json.loads((folder / f"{name}.json").read_text()) for name in _NAMES)
        return Recording({key: _stored(content) for key, content in etcd.items()}, answers, engine, disk)

    def write(self, folder: Path) -> None:
        """Write the recording to a new folder."""
        folder.mkdir()
        etcd = {key: _to_json(stored) for key, stored in self.keys.items()}
        for name, content in zip(_NAMES, (etcd, self.answers, self.engine, self.disk), strict=True):
            lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in content.items()]
            (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def recordings() -> list[Path]:
    """The folders of all recordings, oldest first."""
    return sorted(path.parent for path in RECORDINGS.glob("*/etcd.json"))


def dump(etcd: Etcd, prefix: str) -> dict[str, Stored]:
    """All keys of etcd below `prefix`."""
    send = {"key": _base64(prefix), "range_end": _base64(prefix[:-1] + "0")}
    answer = http_unix.call(etcd.socket, "POST", "/v3/kv/range", send=send)
    return {
        base64.b64decode(pair["key"]).decode().removeprefix(prefix): Stored(
            base64.b64decode(pair.get("value", "")), leased="lease" in pair
        )
        for pair in answer.get("kvs", ())
    }


def load(etcd: Etcd, prefix: str, keys: Mapping[str, Stored]) -> None:
    """Put keys below `prefix`, which must be empty."""
    lease = http_unix.call(etcd.socket, "POST", "/v3/lease/grant", send={"TTL": _LEASE_SECONDS})["ID"]
    for key, stored in keys.items():
        send = {"key": _base64(prefix + key), "value": base64.b64encode(stored.value).decode()}
        http_unix.call(etcd.socket, "POST", "/v3/kv/put", send=send | ({"lease": lease} if stored.leased else {}))


def replace_texts(text: str, replacements: Mapping[str, str]) -> str:
    """`text` with recorded texts, such as engine ids, replaced by others."""
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def require_contains(new: object, old: object, where: str) -> None:
    """Assert that `new` has all values of `old`; it may have more fields. `where` is the path for messages."""
    match old:
        case dict():
            assert isinstance(new, dict), where
            for name, value in old.items():
                assert name in new, f"{where}.{name}"
                require_contains(new[name], value, f"{where}.{name}")
        case list():
            assert isinstance(new, list), where
            assert len(new) == len(old), where
            for number, (new_item, old_item) in enumerate(zip(new, old, strict=True)):
                require_contains(new_item, old_item, f"{where}[{number}]")
        case _:
            assert new == old, where


def _to_json(stored: Stored) -> dict[str, Any]:
    text = stored.value.decode()
    leased = {"leased": True} if stored.leased else {}
    try:
        content = json.loads(text)
    except ValueError:
        return {"text": text} | leased
    return ({"json": content} if _compact(content) == text else {"text": text}) | leased


def _stored(entry: Mapping[str, Any]) -> Stored:
    text = _compact(entry["json"]) if "json" in entry else entry["text"]
    return Stored(text.encode(), leased="leased" in entry)


def _compact(content: object) -> str:
    """JSON as pydantic writes it."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
