"""The paths that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Pages name files of the daemon and of the contract relative to these folders.
FOLDERS = (
    ROOT,
    *(ROOT / folder for folder in ("server/gpudock_server", "server/gpudock_server/core", "protos/gpudock/v1")),
)
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
# `core/operations/`, `app.py`, `error_reason.proto`; not `/var/lib/gpudock/`, nor `rpc/<resource>/service.py`.
PATH = re.compile(r"`([a-z_][\w.-]*(?:(?:/[\w.-]+)+/|(?:/[\w.-]+)*\.(?:py|proto|md|toml)))`")
# Files that the folder of each resource has.
IN_EACH_FOLDER = {"service.py", "requests.py", "messages.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_paths_exist(page: Path) -> None:
    named = set(PATH.findall(page.read_text())) - IN_EACH_FOLDER
    assert sorted(path for path in named if not any((folder / path).exists() for folder in FOLDERS)) == []


def test_a_path_that_does_not_exist_is_found() -> None:
    assert PATH.findall("see `core/nowhere.py` and `core/gone/`, not `/etc/x.py`") == ["core/nowhere.py", "core/gone/"]
