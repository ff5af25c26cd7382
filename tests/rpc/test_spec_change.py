"""Changes of a spec by UpdateContainer and CloneContainer: paths of the mask, and edits of entries."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.core.containers.commands import Create
from gpudock_server.errors import InvalidArgument
from gpudock_server.model.spec import (
    ContainerSpec,
    GpuRequest,
    Mount,
    PortRequest,
    Protocol,
    RestartPolicy,
    RestartPolicyKind,
    RevisionPolicy,
)
from gpudock_server.rpc.containers import requests as container_requests
from gpudock_server.rpc.containers.spec_diff import spec_changes
from gpudock_server.rpc.containers.spec_messages import spec_message
from hypothesis import given, settings

from tests.calls import clone_request, update_request
from tests.rpc.fuzz_requests import requests
from tests.rpc.request_examples import mount, port, violations_of

BEFORE = ContainerSpec(
    image="busybox",
    command=("sleep", "9"),
    env={"A": "1", "B": "2", "a.b": "3"},
    labels={"team": "ml", "example.com/x": "y"},
    gpus=GpuRequest(count=2, model="a100"),
    mounts=(Mount(volume="data", target="/data"), Mount(host_path="/srv", target="/srv")),
    ports=(PortRequest(container_port=8888), PortRequest(container_port=53, protocol=Protocol.UDP)),
    restart_policy=RestartPolicy(kind=RestartPolicyKind.ON_FAILURE, max_retry_count=3),
    revision_policy=RevisionPolicy(keep_revisions=5, keep_for=timedelta(hours=1)),
)


def after(mask: str = "", before: ContainerSpec = BEFORE, **fields: Any) -> ContainerSpec:
    """Return the spec after an update."""
    return container_requests.update(update_request("train", mask, **fields)).change.apply(before)


def edits(**fields: Any) -> container_service_pb2.ContainerSpecEdits:
    return container_service_pb2.ContainerSpecEdits(**fields)


@pytest.mark.parametrize(
    ("mask", "fields", "changed"),
    [
        ("env.C", {"env": {"C": "3"}}, {"env": {**BEFORE.env, "C": "3"}}),
        ("spec.env.C", {"env": {"C": "3"}}, {"env": {**BEFORE.env, "C": "3"}}),
        ("env.A", {}, {"env": {"B": "2", "a.b": "3"}}),
        ("env.A,env.B", {"env": {"A": "9", "X": "not named"}}, {"env": {"A": "9", "a.b": "3"}}),
        ("env.`a.b`", {"env": {"a.b": ""}}, {"env": {**BEFORE.env, "a.b": ""}}),
        ("env.`a``b`", {"env": {"a`b": "x"}}, {"env": {**BEFORE.env, "a`b": "x"}}),
        ("env", {"env": {"C": "3"}}, {"env": {"C": "3"}}),
        ("", {"env": {"C": "3"}}, {"env": {"C": "3"}}),
        ("spec.env", {}, {"env": {}}),
        ("labels.`example.com/x`,labels.team", {"labels": {"team": "x"}}, {"labels": {"team": "x"}}),
        ("gpus.count", {"gpus": container_pb2.GpuRequest(count=4)}, {"gpus": GpuRequest(count=4, model="a100")}),
        ("gpus", {"gpus": container_pb2.GpuRequest(count=4)}, {"gpus": GpuRequest(count=4)}),
        (
            "revision_policy.keep_revisions",
            {"revision_policy": container_pb2.RevisionPolicy(keep_revisions=7)},
            {"revision_policy": RevisionPolicy(keep_revisions=7, keep_for=timedelta(hours=1))},
        ),
        ("revision_policy.keep_for", {}, {"revision_policy": RevisionPolicy(keep_revisions=5)}),
        (
            "restart_policy.max_retry_count",
            {"restart_policy": container_pb2.RestartPolicy(max_retry_count=1)},
            {"restart_policy": RestartPolicy(kind=RestartPolicyKind.ON_FAILURE, max_retry_count=1)},
        ),
    ],
)
def test_a_path_changes_only_its_field(mask: str, fields: dict[str, Any], changed: dict[str, Any]) -> None:
    assert after(mask, **fields) == BEFORE.changed(**changed)


def test_edits_add_replace_and_remove_single_entries() -> None:
    found = after(
        edits=edits(
            set_env={"C": "3", "A": "9"},
            remove_env=["B", "not there"],
            set_labels={"new": "1"},
            remove_labels=["team"],
            add_mounts=[mount(volume="second", target="/s"), mount(volume="other", target="/data", read_only=True)],
            remove_mounts=["/srv"],
            add_ports=[port(9999), port(53, 5353, 2)],
            remove_ports=[container_service_pb2.ContainerPort(container_port=8888)],
        )
    )
    assert found == BEFORE.changed(
        env={"C": "3", "A": "9", "a.b": "3"},
        labels={"new": "1", "example.com/x": "y"},
        mounts=(Mount(volume="other", target="/data", read_only=True), Mount(volume="second", target="/s")),
        ports=(
            PortRequest(container_port=53, host_port=5353, protocol=Protocol.UDP),
            PortRequest(container_port=9999),
        ),
    )


def test_edits_can_be_combined_with_whole_fields_and_used_in_clones() -> None:
    changed = edits(set_env={"C": "3"})
    assert after("command", command=["true"], edits=changed) == BEFORE.changed(
        command=("true",), env={**BEFORE.env, "C": "3"}
    )
    clone = container_requests.clone(clone_request("train", "clone", "labels.team", edits=changed))
    assert clone.change.apply(BEFORE) == BEFORE.changed(env={**BEFORE.env, "C": "3"}, labels={"example.com/x": "y"})
    assert container_requests.clone(clone_request("train", "clone")).change.apply(BEFORE) == BEFORE


def test_all_violations_are_reported_together() -> None:
    request = update_request(
        "A!",
        "env.A,env.a.b,image.tag,mounts.0,gpus.number,nothing",
        env={"A": "\0"},
        edits=edits(
            set_env={"X=Y": ""},
            set_labels={"team": "x", "gpudock.uid": ""},
            remove_labels=["team"],
            add_mounts=[mount(), mount(), container_pb2.Mount(target="/x")],
            remove_mounts=["data:/data", "/data"],
            add_ports=[port(0), port(80)],
            remove_ports=[
                container_service_pb2.ContainerPort(container_port=80, protocol=1),  # type: ignore[arg-type]  # a value of the enum
                container_service_pb2.ContainerPort(container_port=70000, protocol=9),  # type: ignore[arg-type]  # no such value: refused
            ],
        ),
    )
    found = violations_of(container_requests.update, request)
    assert set(found) == {
        "name",
        "update_mask",
        'spec.env["A"]',
        'edits.set_env["X=Y"]',
        "edits.set_env",
        'edits.set_labels["gpudock.uid"]',
        "edits.remove_labels[0]",
        "edits.add_mounts[1].target",
        "edits.add_mounts[2].source",
        "edits.remove_mounts[0]",
        "edits.remove_mounts[1]",
        "edits.add_ports[0].container_port",
        "edits.remove_ports[0]",
        "edits.remove_ports[1].container_port",
        "edits.remove_ports[1].protocol",
    }
    for said in (
        "'env.a.b': put a key with dots or backquotes between backquotes",
        "'image.tag': image can only be replaced as a whole",
        "'mounts.0': mounts can only be replaced as a whole; change its entries with `edits.add_mounts`",
        "'gpus.number': unknown part of gpus; use one of count, uuids, model, min_memory_bytes",
        "'nothing': unknown field; use one of",
    ):
        assert said in found["update_mask"]
    assert "use only one of them" in found["edits.set_env"]


@pytest.mark.parametrize(
    ("mask", "fields", "wrong"),
    [
        ("", {"edits": edits(add_ports=[port(80, 9000), port(81, 9001)])}, "spec.ports[2].host_port"),
        ("", {"edits": edits(set_labels={f"l{n}": "" for n in range(63)})}, "spec.labels"),
        ("", {"edits": edits(add_mounts=[mount(target=f"/m{n}") for n in range(63)])}, "spec.mounts"),
        ("", {"edits": edits(set_env={"BIG": "x" * 200_000})}, "spec.env"),
        ("gpus.uuids", {"gpus": container_pb2.GpuRequest(uuids=["GPU-1"])}, "spec.gpus.count"),
        ("restart_policy.policy", {}, "spec.restart_policy.max_retry_count"),
    ],
)
def test_the_result_obeys_the_rules_of_a_spec(mask: str, fields: dict[str, Any], wrong: str) -> None:
    before = BEFORE.changed(
        env={"E": "x" * 100_000}, ports=(PortRequest(container_port=1, host_port=9000), PortRequest(container_port=2))
    )
    with pytest.raises(InvalidArgument) as refused:
        after(mask, before, **fields)
    assert wrong in {violation.field for violation in refused.value.violations}


def test_unchanged_fields_are_not_checked_again() -> None:
    """A rule that is newer than the container does not prevent changes of other fields."""
    old = BEFORE.changed(mounts=(Mount(volume="data", target="/x/../y"),))
    assert after(before=old, edits=edits(set_env={"C": "3"})) == old.changed(env={**old.env, "C": "3"})


def test_an_update_without_changes_is_refused() -> None:
    assert set(violations_of(container_requests.update, update_request("train", edits=edits()))) == {"update_mask"}


@settings(max_examples=150, deadline=None, database=None)
@given(request=requests(container_service_pb2.UpdateContainerRequest))
def test_any_valid_change_is_applied_or_refused(request: container_service_pb2.UpdateContainerRequest) -> None:
    try:
        changed = container_requests.update(request).change.apply(BEFORE)
    except InvalidArgument:
        return
    # The result is a spec that a request could have.
    whole = container_service_pb2.CreateContainerRequest(name="train", spec=spec_message(changed))
    command = container_requests.create(whole)
    assert isinstance(command, Create)
    assert command.spec == changed


def _difference(before: ContainerSpec, changed: ContainerSpec) -> dict[str, tuple[str | None, str | None]]:
    return {
        change.path: (
            change.old_value if change.HasField("old_value") else None,
            change.new_value if change.HasField("new_value") else None,
        )
        for change in spec_changes(spec_message(before), spec_message(changed))
    }


def test_differences_are_listed_by_value() -> None:
    changed = BEFORE.changed(
        image="other",
        command=(),
        env={"A": "1", "B": "3", "C": ""},
        labels={"team": "ml"},
        gpus=GpuRequest(count=4),
        memory_bytes=1 << 30,
        mounts=(Mount(volume="data", target="/data", read_only=True),),
        ports=(PortRequest(container_port=8888),),
        stop_timeout=timedelta(seconds=5),
        restart_policy=RestartPolicy(kind=RestartPolicyKind.ALWAYS),
        tty=True,
    )
    assert _difference(BEFORE, changed) == {
        "image": ("busybox", "other"),
        "command": ('["sleep", "9"]', None),
        "env.B": ("2", "3"),
        "env.C": (None, ""),
        "env.`a.b`": ("3", None),
        "tty": (None, "true"),
        "labels.`example.com/x`": ("y", None),
        "gpus.count": ("2", "4"),
        "gpus.model": ("a100", None),
        "memory_bytes": (None, "1073741824"),
        'mounts["/data"]': (
            '{"volume": "data", "target": "/data"}',
            '{"volume": "data", "target": "/data", "read_only": true}',
        ),
        'mounts["/srv"]': ('{"host_path": "/srv", "target": "/srv"}', None),
        'ports["53/udp"]': ('{"container_port": 53, "protocol": "PORT_PROTOCOL_UDP"}', None),
        "restart_policy.policy": ("RESTART_POLICY_KIND_ON_FAILURE", "RESTART_POLICY_KIND_ALWAYS"),
        "restart_policy.max_retry_count": ("3", None),
        "stop_timeout": (None, "5s"),
    }
    assert _difference(BEFORE, BEFORE) == {}


def test_another_order_is_a_difference() -> None:
    [path] = _difference(BEFORE, BEFORE.changed(mounts=BEFORE.mounts[::-1]))
    assert path == "mounts"
