"""Images as they are made and shown."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.record import Record

_DEFAULT_REGISTRIES = ("docker.io/", "index.docker.io/")
_DEFAULT_NAMESPACE = "library/"


def familiar_repository(repository: str) -> str:
    """A repository as the engine shows it: `docker.io/library/busybox` is `busybox`."""
    for registry in _DEFAULT_REGISTRIES:
        if repository.startswith(registry):
            repository = repository.removeprefix(registry)
            break
    short = repository.removeprefix(_DEFAULT_NAMESPACE)
    return repository if "/" in short else short


def familiar_reference(reference: str) -> str:
    """An image's name as the engine shows it, with its tag: two spellings of one name become equal."""
    name, at, digest = reference.partition("@")
    if at:
        return f"{familiar_repository(name)}@{digest}"
    head, colon, tag = name.rpartition(":")
    # "registry:5000/image" has a port there, not a tag.
    if not colon or "/" in tag:
        head, tag = name, "latest"
    return f"{familiar_repository(head)}:{tag}"


class ImageOrigin(Record):
    """Where an image of a node's engine came from, by the image's id.

    `committed_as` is the name that gpudock committed the image under, and `committed_for` the owner of the container;
    an empty name: gpudock did not commit it. `restricted`: it came from a registry with somebody's credentials, or from
    a container of an owner. Then `owners` are those who have shown that they may use it.
    """

    node: str
    image_id: str
    committed_as: str = ""
    committed_for: str = ""
    restricted: bool = False
    owners: tuple[str, ...] = ()
    update_time: datetime


class CommittedImage(Record):
    """An image of a container's files, made because a user asked for it; `name` is `repository:tag`."""

    image_id: str
    name: str
    size_bytes: int
    container: str
    revision: int
    create_time: datetime
