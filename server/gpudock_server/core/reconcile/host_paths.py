"""Keeps the bindings of host paths in agreement with the engine containers that mount them."""

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
    engine_containers: EngineContainers,
    view: ContainerView,
    engine_container: EngineContainer,
    report_drift: ReportDrift,
) -> None:
    """Restore the bindings of a container's host paths that were unmounted, and report those that cannot be bound.

    Also report an engine container of an older version, whose host paths the engine resolves itself.
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
                engine_id=engine_container.id,
                engine_name=engine_container.name,
                actual=path,
                message=message,
                plan=plan,
            )
        )

    if unbound := engine_containers.unbound_host_paths(engine_container):
        report(
            DriftKind.HOST_PATH_UNBOUND,
            ",".join(unbound),
            f"{container.name} was created by an older version; the engine resolves its host paths at every start",
            f"no automatic repair: restart or scale {container.name} to replace its engine container",
        )
        return
    try:
        await engine_containers.rebind_host_paths(engine_container, renew=False)
    except (HostPathForbidden, HostPathFailed) as error:
        report(
            DriftKind.HOST_PATH_REFUSED,
            error.host_path,
            f"host path {error.host_path} of {container.name} cannot be bound: {error.detail}",
            "no automatic repair: it can start again only when the path is allowed and has no symbolic link in it",
        )


async def release_unused_host_paths(store: Store, engine: Engine, host_paths: HostPaths, node: str) -> None:
    """Release bindings for engine containers that do not exist and that no unfinished operation may create."""
    # Read the bindings first: a later one belongs to an operation that is read next.
    names = await host_paths.names()
    if not names:
        return
    unfinished = [stored.value for stored in await store.unfinished(node)]
    kept = {
        engine_container_name(operation.target.name, operation.id)
        for operation in unfinished
        if operation.target.kind is ResourceKind.CONTAINER
    }
    # Engine containers of every node: a node that was renamed keeps its state folder.
    for engine_container in await engine.find({LABEL_UID: ""}):
        kept.add(engine_container.created_name)
    for name in sorted(names - kept):
        log.info("releasing host paths of removed engine container", engine_container=name)
        await host_paths.release(name)
