"""The rig's own tests kill engines and unload drivers: they get a rig of their own."""

from collections.abc import Iterator

import pytest

from tests.rig import Rig


@pytest.fixture(scope="package")
def rig() -> Iterator[Rig]:
    """A rig that no other package's daemons live on."""
    with Rig(forks=True) as started:
        yield started
