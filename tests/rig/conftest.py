"""The tests of the rig kill engines and unload drivers, so they have a rig of their own."""

from collections.abc import Iterator

import pytest

from tests.rig import Rig


@pytest.fixture(scope="package")
def rig() -> Iterator[Rig]:
    """A rig that daemons of other packages do not use."""
    with Rig(forks=True) as started:
        yield started
