"""Converts gpudock's records to the engine's JSON and back (field names of the Docker Engine API v1.41). Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from gpudock_server.adapters.docker.nvidia_env import NO_DEVICES, VISIBLE_DEVICES, enforced_environment
from gpudock_server.adapters.docker.volume_options import hazard, is_anonymous
from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.engine import (
    LABEL_SPEC,
    ContainerDefaults,
    EngineContainer,
    EngineContainerSpec,
    EngineImage,
    EngineInfo,
    EngineState,
    EngineVolume,
    NodeLimits,
)
from gpudock_server.model.spec import ContainerSpec, HealthCheck, Mount, Protocol, RestartPolicy, RestartPolicyKind

Json = dict[str, Any]

NANOS_PER_SECOND = 1_000_000_000
_UNLIMITED = -1

# Keeps at most 128 MB of a container's output, so that it cannot fill the shared disk. json-file, because the default
# driver of the host may not allow reading logs.
_LOG_CONFIG = {"Type": "json-file", "Config": {"max-size": "64m", "max-file": "2"}}


def create_request(engine_spec: EngineContainerSpec, defaults: ContainerDefaults) -> Json:
    """The body of `POST /containers/create`."""
    spec = engine_spec.spec
    request: Json = {
        "Image": engine_spec.image_id,
        "Hostname": engine_spec.hostname,
        "User": spec.user,
        "WorkingDir": spec.working_dir,
        "Env": _environment(spec, engine_spec.placement, defaults),
        "Tty": spec.tty,
        "OpenStdin": spec.stdin,
        "Labels": {**spec.labels, **engine_spec.labels, LABEL_SPEC: spec.model_dump_json()},
        "ExposedPorts": {_port_key(port.container_port, port.protocol): {} for port in engine_spec.placement.ports},
        "HostConfig": _host_config(engine_spec, defaults),
    }
    # An absent key means the image's value; an empty list would mean none.
    if spec.entrypoint:
        request["Entrypoint"] = list(spec.entrypoint)
    if spec.command:
        request["Cmd"] = list(spec.command)
    if spec.stop_signal:
        request["StopSignal"] = spec.stop_signal
    if spec.stop_timeout is not None:
        request["StopTimeout"] = whole_seconds(spec.stop_timeout.total_seconds())
    if spec.health_check is not None:
        request["Healthcheck"] = _health_check(spec.health_check)
    return request


def _environment(spec: ContainerSpec, placement: Placement, defaults: ContainerDefaults) -> list[str]:
    # Always set, and after the user's variables. A container's environment overrides its image's, so neither a user nor
    # an image that sets "all" gets GPUs that were not claimed, with any default runtime of the engine.
    forced = enforced_environment(placement.gpu_uuids, defaults.allowed_nvidia_switches)
    return [f"{name}={value}" for name, value in {**spec.env, **forced}.items()]


def _host_config(engine_spec: EngineContainerSpec, defaults: ContainerDefaults) -> Json:
    spec, placement, limits = engine_spec.spec, engine_spec.placement, defaults.limits
    config: Json = {
        "NetworkMode": "default",
        # With MKNOD a container could create a device node, for example for another tenant's GPU. With NET_RAW its root
        # could answer ARP requests for the address of another tenant's container on the same bridge.
        "CapDrop": ["MKNOD", "NET_RAW"] if defaults.drop_net_raw else ["MKNOD"],
        "RestartPolicy": _restart_policy(spec.restart_policy),
        "LogConfig": _LOG_CONFIG,
        "Mounts": _mounts(engine_spec),
        "PortBindings": _port_bindings(placement),
    }
    if placement.gpu_uuids:
        # One entry only: the engine ignores all but the last, and rejects DeviceIDs together with Count.
        gpus = {"Driver": "nvidia", "DeviceIDs": list(placement.gpu_uuids), "Capabilities": [["gpu"]]}
        config["DeviceRequests"] = [gpus]
    if spec.cpus:
        config["NanoCpus"] = nano_cpus(spec.cpus)
    if memory_bytes := spec.memory_bytes or limits.max_memory_bytes:
        config |= memory_limit(memory_bytes)
    if pids := spec.pids_limit or limits.default_pids:
        config["PidsLimit"] = pids
    if defaults.no_new_privileges:
        config["SecurityOpt"] = ["no-new-privileges"]
    if spec.shm_size_bytes:
        config["ShmSize"] = spec.shm_size_bytes
    return config


def _restart_policy(policy: RestartPolicy) -> Json:
    engine_policy = policy.as_engine_policy
    return {"Name": engine_policy.kind.value, "MaximumRetryCount": engine_policy.max_retry_count}


def _mounts(engine_spec: EngineContainerSpec) -> list[Json]:
    mounts = [_mount(mount, engine_spec) for mount in engine_spec.spec.mounts]
    spec_targets = {mount.target for mount in engine_spec.spec.mounts}
    anonymous_volumes = (
        # NoCopy: the engine fills an empty volume with the image's files. This one may be empty because the user
        # deleted its files.
        {"Type": "volume", "Source": volume, "Target": target, "VolumeOptions": {"NoCopy": True}}
        for target, volume in engine_spec.volumes.items()
        if target not in spec_targets
    )
    return [*mounts, *anonymous_volumes]


def _mount(mount: Mount, engine_spec: EngineContainerSpec) -> Json:
    shared = {"Target": mount.target, "ReadOnly": mount.read_only}
    if mount.tmpfs is not None:
        options = {"Mode": mount.tmpfs.mode} | ({"SizeBytes": mount.tmpfs.size_bytes} if mount.tmpfs.size_bytes else {})
        return {"Type": "tmpfs", "TmpfsOptions": options, **shared}
    if mount.host_path:
        # Not the host path itself, which the engine would resolve again at every start.
        return {"Type": "bind", "Source": engine_spec.bound[mount.host_path], **shared}
    return {"Type": "volume", "Source": engine_spec.mounted.get(mount.volume, mount.volume), **shared}


def _port_bindings(placement: Placement) -> Json:
    bindings: Json = {}
    for port in placement.ports:
        key = _port_key(port.container_port, port.protocol)
        bindings.setdefault(key, []).append({"HostPort": str(port.host_port)})
    return bindings


def _port_key(port: int, protocol: str) -> str:
    return f"{port}/{protocol}"


def _health_check(check: HealthCheck) -> Json:
    return {
        "Test": ["CMD", *check.command],
        "Interval": _nanoseconds(check.interval),
        "Timeout": _nanoseconds(check.timeout),
        "StartPeriod": _nanoseconds(check.start_period),
        "Retries": check.retries,
    }


def _nanoseconds(span: timedelta) -> int:
    # In integers: a float would turn 30 s into 29,999,999,999 ns.
    return span // timedelta(microseconds=1) * 1000


def whole_seconds(seconds: float) -> int:
    """A grace period in whole seconds, rounded up, as the engine takes it."""
    return math.ceil(seconds)


def nano_cpus(cpus: float) -> int:
    """CPUs in billionths, the engine's unit."""
    return round(cpus * NANOS_PER_SECOND)


def memory_limit(memory_bytes: int) -> Json:
    """A memory limit, with the same limit for memory plus swap, so that no swap is used on top."""
    return {"Memory": memory_bytes, "MemorySwap": memory_bytes}


def limit_changes(
    host_config: Mapping[str, Any],
    *,
    cpus: float,
    memory_bytes: int,
    pids_limit: int,
    host: EngineInfo,
    limits: NodeLimits,
) -> Json:
    """The body of `POST /containers/ID/update` that gives a container these limits; empty if it has them already.

    The engine cannot remove a CPU or memory limit (a value of 0 means "no change"). A limit of 0 ("no limit") therefore
    becomes all that the host has, which makes no difference to processes. A container without a limit, created by an
    older version, does not get the node's default: it may already use more.
    """
    current_cpus = host_config.get("NanoCpus") or 0
    current_memory = host_config.get("Memory") or 0
    current_pids = _pids_limit(host_config)
    new_cpus = nano_cpus(cpus) or (host.cpus * NANOS_PER_SECOND if current_cpus else 0)
    new_memory = memory_bytes or (limits.max_memory_bytes or host.memory_bytes if current_memory else 0)
    new_pids = pids_limit or (limits.default_pids if current_pids else 0)
    changes: Json = {}
    if new_cpus != current_cpus:
        changes["NanoCpus"] = new_cpus
    if new_memory != current_memory:
        changes |= memory_limit(new_memory)
    if new_pids != current_pids:
        changes["PidsLimit"] = new_pids or _UNLIMITED
    return changes


def _pids_limit(host_config: Mapping[str, Any]) -> int:
    """The limit of processes; 0 if there is none, which engines write as null, 0 or a negative number."""
    return max(host_config.get("PidsLimit") or 0, 0)


def policy_changes(host_config: Mapping[str, Any], policy: RestartPolicy) -> Json:
    """The body of `POST /containers/ID/update` for a restart policy; empty if the container has it already."""
    same = _restart_policy_of(host_config) == policy.as_engine_policy
    return {} if same else {"RestartPolicy": _restart_policy(policy)}


def commit_request(config: Mapping[str, Any], labels: Mapping[str, str]) -> Json:
    """The body of `POST /commit`: a container's config with `labels` added and without its GPUs.

    It is complete, because Dockerfile changes (`ENV PATH=$PATH:/opt`) apply to this body. The engine takes each
    variable and label that is missing here from the container.
    """
    environment = [line for line in config.get("Env") or () if line.partition("=")[0] != VISIBLE_DEVICES]
    no_gpus = f"{VISIBLE_DEVICES}={NO_DEVICES}"
    return {**config, "Labels": {**(config.get("Labels") or {}), **labels}, "Env": [*environment, no_gpus]}


def file_holder_request(inspected: Mapping[str, Any], labels: Mapping[str, str]) -> Json:
    """The body of `POST /containers/create` for a container like the `inspected` one that never runs.

    For each volume of the config it mounts a tmpfs instead, so that the engine does not create an anonymous volume and
    copy the image's files into it.
    """
    config = inspected.get("Config") or {}
    tmpfs = [{"Type": "tmpfs", "Target": target} for target in config.get("Volumes") or ()]
    return {
        **config,
        "Image": inspected["Image"],
        "Labels": dict(labels),
        "HostConfig": {"NetworkMode": "none", "Mounts": tmpfs, "LogConfig": _LOG_CONFIG},
    }


def container(inspected: Mapping[str, Any]) -> EngineContainer:
    """Reads the response of `GET /containers/ID/json`."""
    state: Json = inspected.get("State") or {}
    host: Json = inspected.get("HostConfig") or {}
    config: Json = inspected.get("Config") or {}
    # With the containerd image store, GraphDriver is missing or empty.
    driver: Json = inspected.get("GraphDriver") or {}
    driver_name = driver.get("Name") or ""
    upper = (driver.get("Data") or {}).get("UpperDir") or "" if driver_name == "overlay2" else ""
    health = (state.get("Health") or {}).get("Status") or ""
    return EngineContainer(
        id=inspected["Id"],
        name=inspected["Name"].removeprefix("/"),
        image_id=inspected["Image"],
        state=_state(state),
        pid=state.get("Pid") or 0,
        exit_code=state.get("ExitCode") or 0,
        oom_killed=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        labels=config.get("Labels") or {},
        gpu_uuids=_gpu_uuids(host.get("DeviceRequests") or ()),
        ports=_ports(host.get("PortBindings") or {}),
        spec=_spec((config.get("Labels") or {}).get(LABEL_SPEC, "")),
        upper_dir=upper,
        storage_driver=driver_name,
        volumes={
            mount["Destination"]: mount["Name"]
            for mount in inspected.get("Mounts") or ()
            if mount.get("Type") == "volume"
        },
        binds={
            mount["Destination"]: mount.get("Source") or ""
            for mount in inspected.get("Mounts") or ()
            if mount.get("Type") == "bind"
        },
        cpus=(host.get("NanoCpus") or 0) / NANOS_PER_SECOND,
        memory_bytes=host.get("Memory") or 0,
        pids_limit=_pids_limit(host),
        restart_policy=_restart_policy_of(host),
        restart_count=inspected.get("RestartCount") or 0,
        health="" if health == "none" else health,
        create_time=parse_time(inspected.get("Created")),
        start_time=parse_time(state.get("StartedAt")),
        finish_time=parse_time(state.get("FinishedAt")),
    )


def _state(state: Mapping[str, Any]) -> EngineState:
    try:
        return EngineState(state.get("Status") or "")
    except ValueError:
        # A state of a newer engine. Whether it runs is what matters, and every engine reports that.
        return EngineState.RUNNING if state.get("Running") else EngineState.EXITED


def _restart_policy_of(host_config: Mapping[str, Any]) -> RestartPolicy:
    policy: Json = host_config.get("RestartPolicy") or {}
    kind = RestartPolicyKind(policy.get("Name") or "no")
    return RestartPolicy(kind=kind, max_retry_count=policy.get("MaximumRetryCount") or 0)


def _gpu_uuids(requests: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The GPUs, from HostConfig and not from the environment, where engines with CDI show `void`."""
    return tuple(
        device
        for request in requests
        if any("gpu" in alternative for alternative in request.get("Capabilities") or ())
        for device in request.get("DeviceIDs") or ()
    )


def _ports(bindings: Mapping[str, Sequence[Mapping[str, str]] | None]) -> tuple[PortBinding, ...]:
    """The published ports, from HostConfig, which also has those of a stopped container."""
    return tuple(
        PortBinding(container_port=int(port), protocol=Protocol(protocol), host_port=int(binding["HostPort"]))
        for key, published in bindings.items()
        for port, _, protocol in (key.partition("/"),)
        if protocol in tuple(Protocol)
        for binding in published or ()
        if (binding.get("HostPort") or "").isdecimal()
    )


def _spec(text: str) -> ContainerSpec | None:
    try:
        return ContainerSpec.model_validate_json(text)
    except ValidationError:
        return None


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time of up to nine decimals, cut to microseconds, in UTC; None for the engine's zero time."""
    # Year 1 is Go's zero time, which Python may not be able to convert to UTC.
    if not text or text.startswith("0001-"):
        return None
    return datetime.fromisoformat(text).astimezone(UTC)


def image(inspected: Mapping[str, Any]) -> EngineImage:
    """Reads the response of `GET /images/NAME/json`."""
    config: Json = inspected.get("Config") or {}
    return EngineImage(
        id=inspected["Id"],
        size_bytes=inspected.get("Size") or 0,
        env=tuple(config.get("Env") or ()),
        volumes=tuple(config.get("Volumes") or ()),
        layers=tuple((inspected.get("RootFS") or {}).get("Layers") or ()),
        layer_paths=_layer_paths(inspected.get("GraphDriver") or {}),
    )


def _layer_paths(driver: Mapping[str, Any]) -> tuple[str, ...]:
    """The directories of an image's layers, highest first; empty for storage drivers other than overlay2."""
    data: Json = driver.get("Data") or {}
    if driver.get("Name") != "overlay2" or not data.get("UpperDir"):
        return ()
    lower: str = data.get("LowerDir") or ""
    return (data["UpperDir"], *(lower.split(":") if lower else ()))


def volume(inspected: Mapping[str, Any]) -> EngineVolume:
    """Reads the response of `GET /volumes/NAME`."""
    name, driver = inspected["Name"], inspected["Driver"]
    labels, options = inspected.get("Labels") or {}, inspected.get("Options") or {}
    return EngineVolume(
        name=name,
        driver=driver,
        mountpoint=inspected.get("Mountpoint") or "",
        labels=labels,
        options=options,
        hazard=hazard(driver, options),
        anonymous=is_anonymous(name, labels),
    )


def info(answer: Mapping[str, Any], api_version: str) -> EngineInfo:
    """Reads the response of `GET /info`; `api_version` is the one in use."""
    return EngineInfo(
        # An engine without its data folder has no id.
        id=answer.get("ID") or answer.get("Name") or "",
        version=answer.get("ServerVersion") or "",
        api_version=api_version,
        storage_driver=answer.get("Driver") or "",
        root_dir=answer.get("DockerRootDir") or "",
        cpus=answer.get("NCPU") or 0,
        memory_bytes=answer.get("MemTotal") or 0,
    )
