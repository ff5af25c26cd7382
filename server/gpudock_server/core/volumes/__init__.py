"""Use cases of volumes."""

from gpudock_server.core.volumes.choosing import choose_backend

__all__ = ["choose_backend"]
