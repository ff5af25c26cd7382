"""The container engine through its HTTP API: aiodocker for calls and streams, an own socket for what an exec says."""

from gpudock_server.adapters.docker.engine import DockerEngine

__all__ = ["DockerEngine"]
