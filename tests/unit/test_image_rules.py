"""Which image names a commit can use, and how names are compared."""

from __future__ import annotations

import pytest
from gpudock_server.core.containers.images import ImageNameLocks, ImagePolicy
from gpudock_server.errors import ImageExists, ImageNameForbidden
from gpudock_server.model.image import familiar_reference


@pytest.mark.parametrize(
    ("reference", "familiar"),
    [
        ("busybox", "busybox:latest"),
        ("docker.io/library/busybox:1", "busybox:1"),
        ("index.docker.io/library/busybox:1", "busybox:1"),
        ("library/busybox:1", "busybox:1"),
        ("docker.io/team/model", "team/model:latest"),
        ("library/team/model:1", "library/team/model:1"),
        ("reg:5000/a", "reg:5000/a:latest"),
        ("reg:5000/library/a:1", "reg:5000/library/a:1"),
        ("docker.io/library/a@sha256:00", "a@sha256:00"),
    ],
)
def test_two_spellings_of_a_name_are_equal(reference: str, familiar: str) -> None:
    assert familiar_reference(reference) == familiar


@pytest.mark.parametrize(
    ("repositories", "owner", "repository", "allowed"),
    [
        ((), "", "anything", True),
        (("team",), "", "team", True),
        (("team",), "", "docker.io/library/team", True),
        (("team",), "", "team/a/b", True),
        (("team",), "", "team-b", False),
        (("team",), "", "other/team", False),
        (("reg:5000/team",), "", "reg:5000/team/a", True),
        (("reg:5000/team",), "", "team/a", False),
        (("tenants/{owner}",), "alice", "tenants/alice/m", True),
        (("tenants/{owner}",), "alice", "tenants/alice2/m", False),
        (("tenants/{owner}",), "alice", "tenants", False),
        (("tenants/{owner}",), "", "tenants/", False),
        # These owners would reach the repositories of other owners.
        (("tenants/{owner}",), "alice/sub", "tenants/alice/sub/m", False),
        (("tenants/{owner}",), "Alice", "tenants/alice/m", False),
    ],
)
def test_which_repositories_are_allowed(
    repositories: tuple[str, ...], owner: str, repository: str, *, allowed: bool
) -> None:
    rules = ImagePolicy(repositories=repositories)
    if allowed:
        rules.require_allowed(repository, owner)
    else:
        with pytest.raises(ImageNameForbidden):
            rules.require_allowed(repository, owner)


async def test_a_commit_cannot_use_a_name_during_its_pull() -> None:
    names = ImageNameLocks()
    async with names.pull_lock("busybox"), names.pull_lock("busybox"):
        with pytest.raises(ImageExists):
            async with names.commit_lock("docker.io/library/busybox:latest"):
                raise AssertionError
        async with names.commit_lock("other"):
            pass
    async with names.commit_lock("busybox"):
        pass
