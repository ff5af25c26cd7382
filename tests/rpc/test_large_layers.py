"""A container with too many files for a snapshot is changed without one, and its revision has a warning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.snapshot import SnapshotKey
from gpudock_server.ports import LayerTooLarge, Progress, SnapshotPlan
from typing_extensions import override

from tests.rpc.fake_layers import FakeSnapshots
from tests.rpc.in_memory_server import InMemoryServer, create_container, read_to_end, reason_of, serve

REASON = "there are more than 1000 files and folders"
_ALWAYS = container_pb2.SNAPSHOT_POLICY_ALWAYS
_UNSPECIFIED = container_pb2.SNAPSHOT_POLICY_UNSPECIFIED


@dataclass(eq=False)
class LargeLayers(FakeSnapshots):
    """Snapshots of a layer that is too large at one step: plan, gather or complete."""

    moment: str

    def __post_init__(self) -> None:
        super().__init__()

    @override
    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        plan = await super().plan(old, previous)
        return plan.model_copy(update={"too_large": REASON}) if self.moment == "plan" else plan

    @override
    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        if self.moment == "gather":
            raise LayerTooLarge(REASON)

    @override
    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        if self.moment == "complete":
            raise LayerTooLarge(REASON)


def _rename(
    server: InMemoryServer,
    policy: container_pb2.SnapshotPolicy.ValueType = _UNSPECIFIED,
    *,
    validate_only: bool = False,
) -> Any:
    request = container_service_pb2.UpdateContainerRequest(
        name="a", spec=container_pb2.ContainerSpec(hostname="second"), snapshots=policy, validate_only=validate_only
    )
    request.update_mask.paths.append("hostname")
    return server.containers.UpdateContainer(request)


async def _revisions(server: InMemoryServer) -> list[Any]:
    request = container_service_pb2.ListContainerRevisionsRequest(name="a")
    return list((await server.containers.ListContainerRevisions(request)).revisions)


@pytest.mark.parametrize("moment", ["plan", "gather", "complete"])
async def test_a_change_is_made_without_a_snapshot_and_its_revision_says_why(tmp_path: Path, moment: str) -> None:
    snapshots = LargeLayers(moment)
    async with serve(tmp_path, snapshots=snapshots) as server:
        await create_container(server)
        events, error = await read_to_end(_rename(server))
        assert error is None
        assert events[-1].result.spec.hostname == "second"
        operation = events[-2].operation
        warned = any(REASON in warning for warning in operation.plan.warnings)
        assert warned if moment == "plan" else REASON in operation.message
        old, new = await _revisions(server)
        assert REASON in old.snapshot_warning
        assert not old.HasField("snapshot")
        assert new.snapshot_warning == ""
        assert await snapshots.find() == ()


async def test_the_plan_has_the_warning(tmp_path: Path) -> None:
    async with serve(tmp_path, snapshots=LargeLayers("plan")) as server:
        await create_container(server)
        events, error = await read_to_end(_rename(server, validate_only=True))
        assert error is None
        assert any(REASON in warning for warning in events[-1].operation.plan.warnings)


@pytest.mark.parametrize("moment", ["plan", "gather", "complete"])
async def test_a_call_that_requires_a_snapshot_fails_and_is_undone(tmp_path: Path, moment: str) -> None:
    async with serve(tmp_path, snapshots=LargeLayers(moment)) as server:
        before = await create_container(server)
        _, error = await read_to_end(_rename(server, _ALWAYS))
        assert reason_of(error) == "SNAPSHOT_FAILED"
        assert error is not None
        assert REASON in str(error.details())
        after = await server.containers.GetContainer(container_service_pb2.GetContainerRequest(name="a"))
        assert after.container.spec == before.spec
        assert [revision.revision for revision in await _revisions(server)] == [1]


async def test_a_clone_of_a_layer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async with serve(tmp_path, snapshots=LargeLayers("plan")) as server:
        await create_container(server)
        request = container_service_pb2.CloneContainerRequest(source="a", name="b")
        _, error = await read_to_end(server.containers.CloneContainer(request))
        assert reason_of(error) == "SNAPSHOT_FAILED"
