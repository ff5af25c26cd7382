"""One scenario for each way in which an operation can go: a setup, a command, and what must be there afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    DeleteRevision,
    FieldChange,
    FilesPolicy,
    Pause,
    Restart,
    Rollback,
    Scale,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.model.spec import GpuRequest, Mount

from tests.unit.model_engine import OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_checks import (
    FILES_OF_A,
    check_adopted,
    check_adopted_copy,
    check_cloned,
    check_cloned_by_commit,
    check_committed,
    check_created,
    check_created_only,
    check_deleted,
    check_files_on_other_image,
    check_first_revision_deleted,
    check_fresh_image,
    check_limits,
    check_limits_with_image_snapshot,
    check_not_running,
    check_paused,
    check_pruned,
    check_replaced,
    check_replaced_by_commit,
    check_restarted,
    check_rolled_back,
    check_shrunk,
    check_stopped,
    check_stopped_with_snapshot,
    check_updated_env,
    check_volume,
    check_volume_deleted,
    check_volume_detached,
    running_check,
)
from tests.unit.scenario_setups import (
    DATA_MOUNT,
    MIB,
    Setup,
    adoptable_engine_volume,
    empty_node,
    history_at_its_limit,
    image_snapshots_only,
    layers_with_different_quotas,
    mounted_volume,
    mounted_volume_that_shrinks_by_copy,
    one_transfer_by_commit_done,
    paused_container,
    running_container,
    scaled_container,
    scaled_container_with_image_snapshot,
    snapshot_on_stop,
    stopped_container,
    transfer_by_commit,
    volume,
    volume_of_stopped_container,
)


@dataclass(frozen=True)
class Scenario:
    """A command on a model node.

    `failure_undoes`: a command that fails leaves the node as after `setup`, or as after `alternative_setup`. Otherwise
    the same command, called again, completes the change; `check_after_retry` is what must be so then, where that is
    less than after an undisturbed run.
    """

    name: str
    setup: Setup
    command: Command | volume_commands.Command
    check: Callable[[ModelNode], None]
    failure_undoes: bool = True
    alternative_setup: Setup | None = None
    check_after_retry: Callable[[ModelNode], None] | None = None


CREATED = SPEC.changed(
    image=REMOTE_IMAGE, mounts=(DATA_MOUNT, Mount(host_path="/data/sets", target="/sets", read_only=True))
)
LABEL_CHANGE = FieldChange("labels", {"of": "a"})
THREE_GPUS = GpuRequest(count=3)

SCENARIOS = [
    Scenario("create", volume, Create("a", CREATED, owner="alice"), check_created),
    Scenario("create only", empty_node, Create("a", SPEC, create_only=True), check_created_only),
    Scenario("scale", running_container, Scale("a", gpus=THREE_GPUS), check_replaced),
    Scenario("scale by copy", layers_with_different_quotas, Scale("a", gpus=THREE_GPUS), check_replaced),
    Scenario("scale by commit", transfer_by_commit, Scale("a", gpus=THREE_GPUS), check_replaced_by_commit),
    Scenario(
        "scale by commit again",
        one_transfer_by_commit_done,
        Scale("a", gpus=GpuRequest(count=1)),
        running_check(revision=3, gpu_count=1, files=FILES_OF_A | {"later"}),
    ),
    Scenario("limits", running_container, Scale("a", cpus=1.5), check_limits),
    Scenario("limits, snapshot as image", image_snapshots_only, Scale("a", cpus=1.5), check_limits_with_image_snapshot),
    Scenario("update", running_container, Update("a", FieldChange("env", {"A": "1"})), check_updated_env),
    Scenario(
        "update to another image, discarding files",
        running_container,
        Update("a", FieldChange("image", REMOTE_IMAGE), files=FilesPolicy.DISCARD),
        check_fresh_image,
    ),
    Scenario(
        "update to another image, transferring files",
        running_container,
        Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.CARRY_COMMIT),
        check_files_on_other_image,
    ),
    Scenario("rollback", scaled_container, Rollback("a", 1), check_rolled_back),
    Scenario(
        "rollback to an image snapshot", scaled_container_with_image_snapshot, Rollback("a", 1), check_rolled_back
    ),
    Scenario(
        "rollback of the spec only",
        scaled_container,
        Rollback("a", 1, spec_only=True),
        lambda model: check_rolled_back(model, FILES_OF_A | {"later"}),
    ),
    Scenario("restart", running_container, Restart("a", timeout=4), check_restarted),
    # A container that was unpaused to be stopped is not paused again.
    Scenario(
        "restart of a paused container",
        paused_container,
        Restart("a", timeout=4),
        check_restarted,
        alternative_setup=running_container,
    ),
    Scenario(
        "stop", running_container, Stop("a"), check_stopped, failure_undoes=False, check_after_retry=check_not_running
    ),
    Scenario(
        "stop of a paused container",
        paused_container,
        Stop("a"),
        check_stopped,
        failure_undoes=False,
        check_after_retry=check_not_running,
    ),
    Scenario(
        "stop, keeping resources",
        running_container,
        Stop("a", keep_resources=True),
        lambda model: check_stopped(model, 3),
        failure_undoes=False,
        check_after_retry=lambda model: check_not_running(model, 3),
    ),
    Scenario(
        "stop with snapshot",
        snapshot_on_stop,
        Stop("a"),
        check_stopped_with_snapshot,
        failure_undoes=False,
        check_after_retry=check_not_running,
    ),
    Scenario("start", stopped_container, Start("a"), running_check(revision=1, files=FILES_OF_A)),
    Scenario(
        "start with other GPUs",
        stopped_container,
        Start("a", gpus=THREE_GPUS),
        lambda model: check_replaced(model, stops=0),
    ),
    Scenario("pause", running_container, Pause("a"), check_paused),
    Scenario("unpause", paused_container, Unpause("a"), running_check(revision=1, files=FILES_OF_A)),
    Scenario("delete", running_container, Delete("a", force=True), check_deleted, failure_undoes=False),
    Scenario(
        "delete with images",
        scaled_container_with_image_snapshot,
        Delete("a", force=True),
        check_deleted,
        failure_undoes=False,
    ),
    Scenario(
        "delete a revision",
        scaled_container,
        DeleteRevision("a", 1),
        check_first_revision_deleted,
        failure_undoes=False,
    ),
    Scenario("prune", history_at_its_limit, Scale("a", gpus=GpuRequest(count=1)), check_pruned),
    Scenario("clone", running_container, Clone("b", "a", LABEL_CHANGE, owner="bob"), check_cloned),
    Scenario("clone by commit", transfer_by_commit, Clone("b", "a", LABEL_CHANGE, owner="bob"), check_cloned_by_commit),
    Scenario(
        "clone of a revision",
        scaled_container,
        Clone("b", "a", LABEL_CHANGE, revision=1, owner="bob"),
        lambda model: check_cloned(model, FILES_OF_A, 2, 3),
    ),
    Scenario(
        "clone of a revision with an image snapshot",
        scaled_container_with_image_snapshot,
        Clone("b", "a", LABEL_CHANGE, revision=1, owner="bob"),
        lambda model: check_cloned(model, FILES_OF_A, 2, 3),
    ),
    Scenario("commit", running_container, Commit("a", "team/model:v1"), check_committed),
    Scenario("commit while frozen", image_snapshots_only, Commit("a", "team/model:v1"), check_committed),
    Scenario("create a volume", empty_node, volume_commands.Create("data", size_bytes=64 * MIB), check_volume),
    Scenario(
        "grow a volume",
        mounted_volume,
        volume_commands.Resize("data", 96 * MIB),
        lambda model: check_volume(model, 96 * MIB, 2),
        failure_undoes=False,
    ),
    Scenario(
        "shrink a volume",
        mounted_volume,
        volume_commands.Resize("data", 32 * MIB),
        lambda model: check_volume(model, 32 * MIB, 2),
        failure_undoes=False,
    ),
    Scenario(
        "shrink a volume by a copy",
        mounted_volume_that_shrinks_by_copy,
        volume_commands.Resize("data", 32 * MIB),
        check_shrunk,
    ),
    Scenario("delete a volume", volume, volume_commands.Delete("data"), check_volume_deleted, failure_undoes=False),
    Scenario(
        "delete a volume that is mounted",
        volume_of_stopped_container,
        volume_commands.Delete("data", force=True),
        check_volume_detached,
        failure_undoes=False,
    ),
    Scenario("adopt a volume", adoptable_engine_volume, volume_commands.Adopt("data", "theirs"), check_adopted),
    Scenario(
        "adopt a copy of a volume",
        adoptable_engine_volume,
        volume_commands.Adopt("data", "theirs", size_bytes=64 * MIB),
        check_adopted_copy,
    ),
]
