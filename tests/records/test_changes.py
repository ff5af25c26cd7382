"""Changes of containers that the version of 2026-11-29 recorded: their sagas have the same steps as then. No engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.core.containers.change_plan import AllowedExits, ChangePlan
from gpudock_server.model.container import ContainerState, EngineBinding, Placement
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.record import now
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.snapshot import Snapshot, SnapshotKind
from gpudock_server.model.spec import ContainerSpec

from tests.records.recording import Recording, recordings
from tests.unit.model_node import ModelNode

# Every combination of the arguments that decided the steps, and the steps that the code of that day made of it. The
# words are the names of the arguments that were true, and others with their values; see `recorded` and `steps_of`.
CHANGES: dict[str, str] = json.loads(Path(__file__).with_name("changes.json").read_text())
FLAGS = ("was_running", "frozen", "stop", "start", "replace", "limits", "prunes", "verify", "must_live", "may_end")

_CHANGES = ("START", "RESTART", "SCALE", "UPDATE", "ROLLBACK")
_SPEC = ContainerSpec(image="i")
_OLD = EngineBinding(engine_id="old", engine_name="o", image_id="sha256:1", placement=Placement(), fixed_digest="d")


def recorded(change: str) -> dict[str, Any]:
    """The arguments of a change as they were recorded."""
    words = change.split()
    values = dict(word.split("=") for word in words if "=" in word)
    source: dict[str, Any] = {"files": values.get("files", "CARRY"), "fetch": "fetch" in words}
    source |= {"image_id": values.get("image", ""), "base_image_id": values.get("image", "")}
    if kind := values.get("restores"):
        snapshot = Snapshot(kind=SnapshotKind(kind), image_id="sha256:2", create_time=now())
        source |= {"revision": 1, "snapshot": snapshot.model_dump(mode="json")}
    spec = _SPEC.changed(cpus=2.0) if "limits" in words else _SPEC
    return {
        "old": _OLD.model_dump(mode="json"),
        "old_spec": _SPEC.model_dump(mode="json"),
        "old_placement": Placement().model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
        "placement": Placement().model_dump(mode="json"),
        "revision": 2,
        "carry": values.get("carry", "NONE"),
        "source": source,
        "keep": {"kind": values.get("keep")},
        "stop_timeout": None,
        "cause": None,
        "owner": "",
        "authenticated": False,
        **{flag: flag in words for flag in FLAGS},
    }


def steps_of(arguments: dict[str, Any]) -> str:
    """The steps of a recorded change, with ~ if they can be undone, and then those after its commit."""
    moment = now()
    operation = Operation(
        id="1",
        kind=OperationKind.UPDATE,
        target=ResourceRef(kind=ResourceKind.CONTAINER, name="a", uid="u"),
        node="n",
        state=OperationState.RUNNING,
        create_time=moment,
        update_time=moment,
        arguments=arguments,
    )
    saga = ModelNode().core.container_use_cases.saga_builders[operation.kind](operation)
    steps = [f"{step.name}~" if step.undo else step.name for step in saga.steps]
    return " ".join([*steps, "|", *(step.name for step in saga.cleanup_steps)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_recorded_change_has_the_steps_that_it_had(change: str) -> None:
    words = change.split()
    # What the steps of this method did not depend on.
    without_meaning = {"must_live", "may_end"} | ({"verify"} if "replace" in words or "start" not in words else set())
    for more in ("", *sorted(without_meaning), *(["limits"] if "replace" in words else [])):
        arguments = recorded(f"{change} {more}")
        assert steps_of(arguments) == CHANGES[change], more
        plan = ChangePlan.model_validate(arguments)
        assert (plan.stops_process, plan.starts_process) == ("stop" in words, "start" in words)
        # Read once more, as this version writes it.
        assert ChangePlan.model_validate_json(json.dumps(plan.recorded)) == plan
        assert steps_of(plan.recorded) == CHANGES[change]


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ("replace was_running stop start carry=EXCHANGE must_live", AllowedExits.NONE),
        ("replace was_running stop start carry=EXCHANGE", AllowedExits.ZERO),
        ("replace start carry=EXCHANGE may_end", AllowedExits.ANY),
        ("replace carry=EXCHANGE", None),
        ("start verify may_end", AllowedExits.ANY),
        ("start may_end", None),
        ("was_running stop start verify may_end", AllowedExits.ANY),
        ("was_running limits verify must_live", None),
    ],
)
def test_a_recorded_change_allows_the_exits_that_it_allowed(change: str, allowed: AllowedExits | None) -> None:
    assert ChangePlan.model_validate(recorded(change)).allowed_exits is allowed


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("was_running stop start", ContainerState.RUNNING),
        ("was_running frozen stop start", ContainerState.PAUSED),
        ("start", ContainerState.STOPPED),
    ],
)
def test_a_recorded_change_tells_the_state_before_it(change: str, state: ContainerState) -> None:
    assert ChangePlan.model_validate(recorded(change)).old_state is state


def test_a_change_without_the_arguments_that_came_later_is_read() -> None:
    arguments = recorded("was_running stop start")
    for name in ("frozen", "limits", "carry", "source", "keep", "prunes", "verify", "must_live", "may_end", "owner"):
        del arguments[name]
    assert ChangePlan.model_validate(arguments) == ChangePlan.model_validate(recorded("was_running stop start"))


@pytest.mark.parametrize("folder", recordings(), ids=lambda folder: folder.name)
def test_half_done_changes_have_the_steps_of_their_stages(folder: Path) -> None:
    keys, names = Recording.read(folder).keys, set[str]()
    for key, stored in keys.items():
        if key.startswith("arguments/"):
            operation = json.loads(keys[f"operations/{key.removeprefix('arguments/')}"].value)["record"]
            arguments = json.loads(stored.value)["record"]["arguments"]
            if operation["kind"] in _CHANGES:
                names.add(operation["target"]["name"])
                steps = steps_of(arguments).replace("~", "").replace("|", "commit").split()
                assert steps == [stage["name"] for stage in operation["stages"]]
    assert names
