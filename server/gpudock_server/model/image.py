"""Images: names, origins, and images that a commit created."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.record import Record

_DEFAULT_REGISTRIES = ("docker.io/", "index.docker.io/")
_DEFAULT_NAMESPACE = "library/"


def familiar_repository(repository: str) -> str:
    """Shorten a repository as the engine does: `docker.io/library/busybox` becomes `busybox`."""
    for registry in _DEFAULT_REGISTRIES:
        if repository.startswith(registry):
            repository = repository.removeprefix(registry)
            break
    short = repository.removeprefix(_DEFAULT_NAMESPACE)
    return repository if "/" in short else short


def familiar_reference(reference: str) -> str:
    """Normalize the name of an image as the engine does, with its tag: equal names become equal strings."""
    name, at, digest = reference.partition("@")
    if at:
        return f"{familiar_repository(name)}@{digest}"
    head, colon, tag = name.rpartition(":")
    # "registry:5000/image" has a port and no tag.
    if not colon or "/" in tag:
        head, tag = name, "latest"
    return f"{familiar_repository(head)}:{tag}"


class ImageOrigin(Record):
    """The origin of an image in a node's engine.

    `committed_as` is the name under which gpudock committed the image, empty if it did not; `committed_for` is the
    owner of the container. `restricted`: the image was pulled with credentials, or committed from a container of an
    owner; `owners` are then the owners who have proved that they may use it.
    """

    node: str
    image_id: str
    committed_as: str = ""
    committed_for: str = ""
    restricted: bool = False
    owners: tuple[str, ...] = ()
    update_time: datetime


class CommittedImage(Record):
    """An image that a user committed from a container; `name` is `repository:tag`."""

    image_id: str
    name: str
    size_bytes: int
    container: str
    revision: int
    create_time: datetime
