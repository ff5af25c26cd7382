"""docs/security.md names a test for each threat; those tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_NAMED = re.findall(r"`((?:tests|deploy)/[^`]+)`", (_REPOSITORY / "docs/security.md").read_text(encoding="utf-8"))


def test_the_document_names_tests() -> None:
    assert len(_NAMED) > 20


@pytest.mark.parametrize("named", sorted(set(_NAMED)))
def test_a_named_test_exists(named: str) -> None:
    path, _, function = named.partition("::")
    text = (_REPOSITORY / path).read_text(encoding="utf-8")
    assert not function or re.search(rf"^(async )?def {re.escape(function)}\(", text, re.MULTILINE)
