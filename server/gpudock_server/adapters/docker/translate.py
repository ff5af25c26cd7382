"""Our words into the engine's JSON and back. Pure; the field names are those of the Docker Engine API v1.41."""

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

_NANO = 1_000_000_000
_UNLIMITED = -1

# A container that talks without end must not fill the disk that all share; 128 MB of it are kept. And json-file is
# named because its logs can be read back, whatever driver the host prefers.
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
    # Absent is the image's; an empty list would mean "none at all".
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
    # Always set and always ours, and a container's word beats its image's: so neither a user nor an image that says
    # "all" sees more cards than were claimed, whatever runtime the engine defaults to.
    forced = enforced_environment(placement.gpu_uuids, defaults.allowed_nvidia_switches)
    return [f"{name}={value}" for name, value in {**spec.env, **forced}.items()]


def _host_config(engine_spec: EngineContainerSpec, defaults: ContainerDefaults) -> Json:
    spec, placement, limits = engine_spec.spec, engine_spec.placement, defaults.limits
    config: Json = {
        "NetworkMode": "default",
        # Without MKNOD nobody inside can make a device node, for another tenant's card for example. With NET_RAW root
        # inside could answer ARP requests for the address of another tenant's container on the same bridge.
        "CapDrop": ["MKNOD", "NET_RAW"] if defaults.drop_net_raw else ["MKNOD"],
        "RestartPolicy": _restart_policy(spec.restart_policy),
        "LogConfig": _LOG_CONFIG,
        "Mounts": _mounts(engine_spec),
        "PortBindings": _port_bindings(placement),
    }
    if placement.gpu_uuids:
        # Exactly one entry: of two the engine heeds only the last, and DeviceIDs beside Count it refuses.
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
    taken = {mount.target for mount in engine_spec.spec.mounts}
    kept_volumes = (
        # NoCopy: the engine fills an empty volume with the image's files. This one may be empty because the user
        # deleted them.
        {"Type": "volume", "Source": volume, "Target": target, "VolumeOptions": {"NoCopy": True}}
        for target, volume in engine_spec.volumes.items()
        if target not in taken
    )
    return [*mounts, *kept_volumes]


def _mount(mount: Mount, engine_spec: EngineContainerSpec) -> Json:
    shared = {"Target": mount.target, "ReadOnly": mount.read_only}
    if mount.tmpfs is not None:
        options = {"Mode": mount.tmpfs.mode} | ({"SizeBytes": mount.tmpfs.size_bytes} if mount.tmpfs.size_bytes else {})
        return {"Type": "tmpfs", "TmpfsOptions": options, **shared}
    if mount.host_path:
        # Never the host path itself: the engine would resolve it again at every start.
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
    # By whole microseconds and not through a float, which would make 30 s of 29,999,999,999 ns.
    return span // timedelta(microseconds=1) * 1000


def whole_seconds(seconds: float) -> int:
    """A grace period as the engine takes it: in whole seconds, never shorter than asked."""
    return math.ceil(seconds)


def nano_cpus(cpus: float) -> int:
    """CPUs in the engine's billionths."""
    return round(cpus * _NANO)


def memory_limit(memory_bytes: int) -> Json:
    """A limit of memory; the limit of memory and swap together is the same, so that swap does not widen it."""
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
    """The body of `POST /containers/ID/update` that gives a container these limits; empty when it has them.

    The engine cannot take a limit of CPU or memory away from a container that has one (to it 0 is "leave it alone"). 0,
    our "no limit", is therefore all that the host has: there is no difference that a process could notice. A container
    without a limit that is to have the node's default, because an older version made it, is left without one: it may
    already use more.
    """
    has_cpus = host_config.get("NanoCpus") or 0
    has_memory = host_config.get("Memory") or 0
    wants_cpus = nano_cpus(cpus) or (host.cpus * _NANO if has_cpus else 0)
    wants_memory = memory_bytes or (limits.max_memory_bytes or host.memory_bytes if has_memory else 0)
    has_pids = _pids_limit(host_config)
    wants_pids = pids_limit or (limits.default_pids if has_pids else 0)
    changes: Json = {}
    if wants_cpus != has_cpus:
        changes["NanoCpus"] = wants_cpus
    if wants_memory != has_memory:
        changes |= memory_limit(wants_memory)
    if wants_pids != has_pids:
        changes["PidsLimit"] = wants_pids or _UNLIMITED
    return changes


def _pids_limit(host_config: Mapping[str, Any]) -> int:
    """The limit of processes; 0 for none, which engines write as null, 0 or a negative number."""
    return max(host_config.get("PidsLimit") or 0, 0)


def policy_changes(host_config: Mapping[str, Any], policy: RestartPolicy) -> Json:
    """The same for a restart policy."""
    same = _restart_policy_of(host_config) == policy.as_engine_policy
    return {} if same else {"RestartPolicy": _restart_policy(policy)}


def commit_request(config: Mapping[str, Any], labels: Mapping[str, str]) -> Json:
    """The body of `POST /commit`, of a container's config: the same with these labels, and without its cards.

    All of it is said, because changes (`ENV PATH=$PATH:/opt`) are made to what is said here. What is left out, the
    engine takes from the container's own, each variable and label by itself.
    """
    environment = [line for line in config.get("Env") or () if line.partition("=")[0] != VISIBLE_DEVICES]
    no_cards = f"{VISIBLE_DEVICES}={NO_DEVICES}"
    return {**config, "Labels": {**(config.get("Labels") or {}), **labels}, "Env": [*environment, no_cards]}


def shadow_request(shown: Mapping[str, Any], labels: Mapping[str, str]) -> Json:
    """The body of `POST /containers/create` for a container like the one `shown`, which never runs.

    A tmpfs where the config has a volume keeps the engine from making an anonymous one, and from filling that with what
    the image has there.
    """
    config = shown.get("Config") or {}
    tmpfs = [{"Type": "tmpfs", "Target": target} for target in config.get("Volumes") or ()]
    return {
        **config,
        "Image": shown["Image"],
        "Labels": dict(labels),
        "HostConfig": {"NetworkMode": "none", "Mounts": tmpfs, "LogConfig": _LOG_CONFIG},
    }


def container(inspected: Mapping[str, Any]) -> EngineContainer:
    """What `GET /containers/ID/json` shows."""
    state: Json = inspected.get("State") or {}
    host: Json = inspected.get("HostConfig") or {}
    config: Json = inspected.get("Config") or {}
    # The containerd image store has no GraphDriver, or an empty one.
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
        cpus=(host.get("NanoCpus") or 0) / _NANO,
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
        # A newer engine's new word. Whether it runs is what matters, and every engine says that.
        return EngineState.RUNNING if state.get("Running") else EngineState.EXITED


def _restart_policy_of(host_config: Mapping[str, Any]) -> RestartPolicy:
    shown: Json = host_config.get("RestartPolicy") or {}
    kind = RestartPolicyKind(shown.get("Name") or "no")
    return RestartPolicy(kind=kind, max_retry_count=shown.get("MaximumRetryCount") or 0)


def _gpu_uuids(requests: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The cards, from HostConfig and never from the environment: engines with CDI show `void` there."""
    return tuple(
        device
        for request in requests
        if any("gpu" in alternative for alternative in request.get("Capabilities") or ())
        for device in request.get("DeviceIDs") or ()
    )


def _ports(bindings: Mapping[str, Sequence[Mapping[str, str]] | None]) -> tuple[PortBinding, ...]:
    """What it was made to publish: from HostConfig, which has it also while it does not run."""
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
    # Year 1 is Go's zero time; converting it to UTC could leave the calendar.
    if not text or text.startswith("0001-"):
        return None
    return datetime.fromisoformat(text).astimezone(UTC)


def image(inspected: Mapping[str, Any]) -> EngineImage:
    """What `GET /images/NAME/json` shows."""
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
    """The folders of an image's layers, the highest first; none for another driver than overlay2."""
    data: Json = driver.get("Data") or {}
    if driver.get("Name") != "overlay2" or not data.get("UpperDir"):
        return ()
    lower: str = data.get("LowerDir") or ""
    return (data["UpperDir"], *(lower.split(":") if lower else ()))


def volume(inspected: Mapping[str, Any]) -> EngineVolume:
    """What `GET /volumes/NAME` shows."""
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
    """What `GET /info` shows, and the API version in use."""
    return EngineInfo(
        # Without its data folder an engine has no id; then its host's name is the next best.
        id=answer.get("ID") or answer.get("Name") or "",
        version=answer.get("ServerVersion") or "",
        api_version=api_version,
        storage_driver=answer.get("Driver") or "",
        root_dir=answer.get("DockerRootDir") or "",
        cpus=answer.get("NCPU") or 0,
        memory_bytes=answer.get("MemTotal") or 0,
    )
