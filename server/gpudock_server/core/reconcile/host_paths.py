"""What is bound for host paths, against the engine containers that mount it."""

from __future__ import annotations

import structlog

from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.errors import HostPathFailed, HostPathForbidden
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import LABEL_UID, EngineContainer
from gpudock_server.model.names import engine_container_name
from gpudock_server.model.resource import ResourceKind
from gpudock_server.ports import ContainerView, Engine, HostPaths, Store

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def repair_host_paths(
    engine_containers: EngineContainers, view: ContainerView, shown: EngineContainer, report_drift: ReportDrift
) -> None:
    """Bind again what a container mounts and somebody has unmounted, and report what cannot be bound.

    Also one that an older version made, whose host paths the engine resolves itself.
    """
    container = view.container
    if view.operation_id or not container.spec.host_paths:
        return

    def report(kind: DriftKind, path: str, message: str, plan: str) -> None:
        report_drift(
            Drift(
                kind=kind,
                remedy=DriftRemedy.REPORTED,
                container=container.name,
                uid=container.uid,
                engine_id=shown.id,
                engine_name=shown.name,
                actual=path,
                message=message,
                plan=plan,
            )
        )

    if unbound := engine_containers.unbound_host_paths(shown):
        report(
            DriftKind.HOST_PATH_UNBOUND,
            ",".join(unbound),
            f"an older version made {container.name}, and the engine resolves its host paths again at every start",
            f"nothing while it runs: restart or scale {container.name} to have it replaced",
        )
        return
    try:
        await engine_containers.rebind_host_paths(shown, renew=False)
    except (HostPathForbidden, HostPathFailed) as error:
        report(
            DriftKind.HOST_PATH_REFUSED,
            error.host_path,
            f"{container.name} mounts {error.host_path}, which cannot be bound: {error.detail}",
            "nothing: the engine cannot start it again until the path is allowed and has no symbolic link in it",
        )


async def release_unused_host_paths(store: Store, engine: Engine, host_paths: HostPaths, node: str) -> None:
    """Release what is bound for engine containers that do not exist and that no operation is about to make."""
    # First: what is bound after this has an operation that is read next.
    names = await host_paths.names()
    if not names:
        return
    unfinished = [stored.value for stored in await store.unfinished(node)]
    kept = {
        engine_container_name(operation.target.name, operation.id)
        for operation in unfinished
        if operation.target.kind is ResourceKind.CONTAINER
    }
    # Of every node: one that was given another name has the same state folder.
    for one in await engine.find({LABEL_UID: ""}):
        kept.add(one.created_name)
    for name in sorted(names - kept):
        log.info("host paths of an engine container that is gone are released", engine_container=name)
        await host_paths.release(name)
