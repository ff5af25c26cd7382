"""A response of Docker for tests."""

from __future__ import annotations

from typing import Any

# A container as `docker inspect` shows it.
INSPECTED: dict[str, Any] = {
    "Id": "c0ffee",
    "Name": "/web-1",
    "Image": "sha256:1",
    "RestartCount": 2,
    "State": {
        "Status": "exited",
        "Running": False,
        "Pid": 0,
        "ExitCode": 137,
        "OOMKilled": True,
        "Error": "",
        "StartedAt": "2026-01-02T03:04:05.123456789Z",
        "FinishedAt": "2026-01-02T04:04:05+01:00",
        "Health": {"Status": "unhealthy"},
    },
    "Config": {"Labels": {"gpudock.uid": "u1"}},
    "HostConfig": {
        "NanoCpus": 250_000_000,
        "Memory": 1 << 20,
        "DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": ["GPU-1"], "Capabilities": [["gpu"]]}],
    },
    "GraphDriver": {"Name": "overlay2", "Data": {"UpperDir": "/var/lib/docker/overlay2/x/diff"}},
    "Mounts": [
        {"Type": "volume", "Name": "v1", "Destination": "/data"},
        {"Type": "bind", "Source": "/x", "Destination": "/y"},
    ],
}
