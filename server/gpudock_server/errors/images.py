"""Errors about images."""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class ImageNotFound(GpudockError):
    """The node does not have the image, or the owner may not use it.

    The message names no other images: they may belong to other tenants.
    """

    code = Code.NOT_FOUND
    reason = "IMAGE_NOT_FOUND"
    template = "image {image!r} not found on this node; correct the name, or have it pulled"
    image: str


@dataclass(eq=False)
class ImageExists(GpudockError):
    """An image has the name that a commit requests, and the commit may not replace it."""

    code = Code.ALREADY_EXISTS
    reason = "IMAGE_EXISTS"
    template = "image {image!r} already exists and cannot be replaced: {detail}"
    image: str
    detail: str


@dataclass(eq=False)
class ImageNameForbidden(GpudockError):
    """The settings of the node do not allow this repository for commits of this owner."""

    code = Code.PERMISSION_DENIED
    reason = "IMAGE_NAME_FORBIDDEN"
    template = "repository {repository!r} is not allowed for commits on this node; allowed: {allowed}"
    repository: str
    allowed: tuple[str, ...]


@dataclass(eq=False)
class ImageDiffers(GpudockError):
    """The files of a container belong to another image, and the request does not say what to do with them."""

    code = Code.FAILED_PRECONDITION
    reason = "IMAGE_DIFFERS"
    template = (
        "image {image!r} ({image_id}) is not the image that the files of container {container!r} belong to"
        " ({current_image_id}); set `files` to keep or discard them"
    )
    container: str
    image: str
    image_id: str
    current_image_id: str


@dataclass(eq=False)
class PulledImageDiffers(ImageDiffers):
    """The engine no longer has the image of a revision, and the image's name now refers to another image."""

    template = (
        "the files of that revision of container {container!r} belong to image {current_image_id}, which the engine no"
        " longer has; {image!r} is now {image_id}. Restore the image (`docker pull` by its digest, or `docker load`),"
        " and call this again"
    )


@dataclass(eq=False)
class ImagePullFailed(GpudockError):
    """The registry refused the pull or did not answer."""

    code = Code.FAILED_PRECONDITION
    reason = "IMAGE_PULL_FAILED"
    template = "image {image!r} could not be pulled: {detail}"
    image: str
    detail: str
