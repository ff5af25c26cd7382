"""Check image names against the grammar of https://pkg.go.dev/github.com/distribution/reference, and image ids."""

from __future__ import annotations

import re

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?"
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_LOCAL = rf"{_PART}(?:/{_PART})*(?::{_TAG})?(?:@{_DIGEST})?"
_LOCAL_REFERENCE = re.compile(_LOCAL, re.ASCII)
_REFERENCE = re.compile(rf"(?:{_HOST}/)?{_LOCAL}", re.ASCII)
# A full id or a unique prefix of one. Without `sha256:` a prefix is also a repository in the grammar above; the engine
# tries both.
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{4,64}", re.ASCII)

_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_REGISTRY = re.compile(rf"(?:{_HOST})/(?P<rest>.+)", re.ASCII)
_TAG_ALONE = re.compile(_TAG, re.ASCII)
_FULL_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)


def is_repository(text: str) -> bool:
    """Whether `text` (of a bounded length) can name a new image: a repository without tag and digest.

    The part before the first slash is a registry if it has a dot or a port, or is `localhost`. Upper case is allowed
    only in a registry.
    """
    if _has_registry(text):
        rest = text.partition("/")[2]
        return _REGISTRY.fullmatch(text) is not None and _REPOSITORY.fullmatch(rest) is not None
    return _REPOSITORY.fullmatch(text) is not None and _FULL_ID.fullmatch(text) is None


def is_tag(text: str) -> bool:
    """Whether `text` can be the tag of an image."""
    return _TAG_ALONE.fullmatch(text) is not None


def is_image_reference(text: str) -> bool:
    """Whether `text` (of a bounded length) can name an image. Upper case is allowed only in a registry."""
    if _ID.fullmatch(text) is not None:
        return True
    if not _has_registry(text):
        return _LOCAL_REFERENCE.fullmatch(text) is not None
    return _REFERENCE.fullmatch(text) is not None


def split_reference(reference: str) -> tuple[str, str]:
    """An image's name, and its tag or digest; `latest` if it has neither, as the engine would pull all its tags."""
    name, at, digest = reference.partition("@")
    if at:
        return name, digest
    head, colon, tag = name.rpartition(":")
    # In "registry:5000/image" a port follows the colon.
    if colon and "/" not in tag:
        return head, tag
    return name, "latest"


def _has_registry(text: str) -> bool:
    """Whether the part before the first slash is a registry: it has a dot or a port, or is `localhost`."""
    first, slash, _ = text.partition("/")
    return bool(slash) and (first == "localhost" or "." in first or ":" in first)
