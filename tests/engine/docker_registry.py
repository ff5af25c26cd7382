"""A registry of two small images, on the loopback interface of the rig's engine.

It implements the part of https://distribution.github.io/distribution/spec/api/ that a pull needs. The image `whole` can
be pulled; the image `broken` has a manifest whose layer is missing.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.rig import Rig

USER, SECRET = "me", "secret"
LAYER_BYTES = 3 << 20
STALL_BYTES = 1 << 20
_DOCKER = "application/vnd.docker"

_SERVER = """
import http.server, json, pathlib, sys, base64, time
released = pathlib.Path(sys.argv[1] + ".released")
class Registry(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        files = json.loads(pathlib.Path(sys.argv[1]).read_text())
        if files["authorization"] and self.headers.get("Authorization") != files["authorization"]:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kind, body = files["paths"].get(self.path, ["", None])
        content = base64.b64decode(body) if body is not None else b"{}"
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", kind or "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:files["stalls_after"]])
            self.wfile.flush()
            while len(content) > files["stalls_after"] and not released.exists():
                time.sleep(0.05)
            self.wfile.write(content[files["stalls_after"]:])
    do_HEAD = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
print(server.server_port, flush=True)
server.serve_forever()
"""


@asynccontextmanager
async def registry(rig: Rig, folder: Path, *, locked: bool = False, stalls: bool = False) -> AsyncIterator[str]:
    """Run a registry with its files in `folder`; yields HOST:PORT. With `locked` it needs USER and SECRET.

    With `stalls` it stops in the middle of a layer, with the connection open, until `release` is called.
    """
    publish(folder, locked=locked, stalls=stalls)
    words = [*rig.namespaces.enter(), sys.executable, "-c", _SERVER, str(folder / "files")]
    server = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    try:
        assert server.stdout is not None
        yield f"127.0.0.1:{int(await server.stdout.readline())}"
    finally:
        server.kill()
        await server.wait()


@asynccontextmanager
async def registry_image(rig: Rig, folder: Path, *, locked: bool = False, stalls: bool = False) -> AsyncIterator[str]:
    """Run a registry as `registry` does; yields the name of its image `whole`, which is removed from the engine."""
    async with registry(rig, folder, locked=locked, stalls=stalls) as host:
        image = f"{host}/whole:latest"
        yield image
        rig.engine.remove_all()
        if image in {tag for stored in rig.engine.call("GET", "/images/json") for tag in stored["RepoTags"] or ()}:
            rig.engine.call("DELETE", f"/images/{image}")


def release(folder: Path) -> None:
    """Let a stalled registry send the rest of the layer."""
    (folder / "files.released").touch()


def publish(folder: Path, *, locked: bool = False, stalls: bool = False, seed: str = "whole") -> None:
    """Write the images that the registry serves; another `seed` makes another image `whole`."""
    files = {"/v2/": ("application/json", b"{}")} | _image("whole", seed) | _without_layer(_image("broken", "broken"))
    content = {
        "authorization": "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode() if locked else "",
        "stalls_after": STALL_BYTES if stalls else sys.maxsize,
        "paths": {path: (kind, base64.b64encode(body).decode()) for path, (kind, body) in files.items()},
    }
    (folder / "files").write_text(json.dumps(content))


_Files = dict[str, tuple[str, bytes]]


def _image(repository: str, seed: str) -> _Files:
    """An image of one layer: content type and content by the path in the registry."""
    tar = _tar(seed)
    layer = gzip.compress(tar, compresslevel=1)
    root = {"type": "layers", "diff_ids": [_digest(tar)]}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": root}).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{_DOCKER}.distribution.manifest.v2+json",
            "config": _part(f"{_DOCKER}.container.image.v1+json", config),
            "layers": [_part(f"{_DOCKER}.image.rootfs.diff.tar.gzip", layer)],
        }
    ).encode()
    return {
        f"/v2/{repository}/manifests/latest": (f"{_DOCKER}.distribution.manifest.v2+json", manifest),
        f"/v2/{repository}/manifests/{_digest(manifest)}": (f"{_DOCKER}.distribution.manifest.v2+json", manifest),
        f"/v2/{repository}/blobs/{_digest(config)}": ("application/octet-stream", config),
        f"/v2/{repository}/blobs/{_digest(layer)}": ("application/octet-stream", layer),
    }


def _without_layer(files: _Files) -> _Files:
    return dict(list(files.items())[:-1])


def _tar(seed: str) -> bytes:
    """A tar archive with an incompressible file, different for each seed: an engine downloads a layer only once."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("payload")
        member.size = LAYER_BYTES
        tar.addfile(member, io.BytesIO(hashlib.shake_256(seed.encode()).digest(LAYER_BYTES)))
    return buffer.getvalue()


def _part(kind: str, data: bytes) -> dict[str, str | int]:
    return {"mediaType": kind, "size": len(data), "digest": _digest(data)}


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
