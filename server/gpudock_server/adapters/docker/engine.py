"""The Docker Engine as ports.Engine: connection, info, events and execs; its base classes have the other calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

from gpudock_server.adapters.docker.address import EngineAddress
from gpudock_server.adapters.docker.connection import Connection, path_segment
from gpudock_server.adapters.docker.containers import ContainerCalls
from gpudock_server.adapters.docker.events import events
from gpudock_server.adapters.docker.exec_session import DockerExecSession
from gpudock_server.adapters.docker.images import ImageCalls
from gpudock_server.adapters.docker.volumes import VolumeCalls
from gpudock_server.model.engine import ContainerDefaults, EngineEvent, ExecRequest


class DockerEngine(ContainerCalls, ImageCalls, VolumeCalls):
    """Implements ports.Engine. Created by `connect`; safe for any number of concurrent tasks.

    Every call ends within the `timeout` of `connect`, at the latest with EngineUnavailable. A stop may take its grace
    period longer; a commit, and each call that edits images, may take 30 times as long; the time of a start begins when
    it gets its turn. A cancelled call leaves no connection open, but the engine may still carry it out.
    """

    def __init__(
        self, connection: Connection, scratch_dir: Path | None = None, defaults: ContainerDefaults | None = None
    ) -> None:
        ContainerCalls.__init__(self, connection, defaults or ContainerDefaults())
        ImageCalls.__init__(self, connection, scratch_dir)
        VolumeCalls.__init__(self, connection)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        tls: Path | None = None,
        timeout: float = 60.0,
        scratch_dir: Path | None = None,
        defaults: ContainerDefaults | None = None,
    ) -> Self:
        """Connect to `unix:///PATH` or `tcp://HOST:PORT` and negotiate an API version.

        `tls` is a folder with ca.pem, cert.pem and key.pem; `timeout` is in seconds; `scratch_dir` is a folder with
        space for image layers being edited (None: the system's temporary folder); `defaults` apply to every container
        created. Raises ValueError for an unusable address or certificate, EngineUnavailable, and EngineRejected if
        no API version fits.
        """
        connection = Connection(EngineAddress.parse(url, tls), timeout)
        try:
            await connection.negotiate()
        except BaseException:
            await connection.close()
            raise
        return cls(connection, scratch_dir, defaults)

    async def close(self) -> None:
        """Close all connections except those of exec sessions. May be called again."""
        await self._connection.close()

    def events(self, since_nanos: int) -> AsyncIterator[EngineEvent]:
        """Events of gpudock's containers from `since_nanos` (inclusive; 0: now); ends only with EngineUnavailable."""
        return events(self._connection, since_nanos)

    async def exec(self, engine_id: str, request: ExecRequest) -> DockerExecSession:
        """Start a process inside a running container.

        A command that cannot be started raises no error here: see `ExecStatus.start_error`.
        """
        return await DockerExecSession.start(self._connection, path_segment(engine_id), request)
