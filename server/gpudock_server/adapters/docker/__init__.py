"""The Docker Engine through its HTTP API: aiodocker for calls and streams, a raw socket for the streams of an exec."""

from gpudock_server.adapters.docker.engine import DockerEngine

__all__ = ["DockerEngine"]
