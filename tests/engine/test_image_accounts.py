"""A user that an image does not have is refused before anything is created, as the engine refuses it at a start."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import container_service_pb2
from gpudock_server.adapters.docker.engine import DockerEngine
from gpudock_server.adapters.layers.accounts import read_accounts
from gpudock_server.adapters.layers.store import OverlayLayerStore

from tests.calls import IMAGE, Caller, clone_request, failure, progress_of, update_request
from tests.rig import HttpStatusError, Rig
from tests.rig.images import tar_of
from tests.selection import deep_except

ADDED_USER = b"more:x:7:7::/:/bin/sh\n"
# Files of a layer above that of the image. A `.wh.NAME` file deletes NAME of lower layers; `.wh..wh..opq` deletes all
# that lower layers have in its folder.
LAYERS: dict[str, dict[str, bytes]] = {
    "nothing changed": {"tmp/x": b""},
    "files replaced": {"etc/passwd": b"root:x:0:0::/:\n" + ADDED_USER, "etc/group": b"most:x:8:\n"},
    "passwd deleted": {"etc/.wh.passwd": b""},
    "etc deleted": {".wh.etc": b""},
    "etc replaced": {"etc/.wh..wh..opq": b"", "etc/passwd": ADDED_USER},
    "etc emptied": {"etc/.wh..wh..opq": b"", "etc/x": b""},
    "odd lines": {"etc/passwd": b"\n  more:x:7:7::/:\n#root\n:::\nuser"},
}
UNRESOLVABLE = {
    "passwd is a link": "mv /etc/passwd /etc/there; ln -s there /etc/passwd",
    "passwd is a FIFO": "rm /etc/passwd; mkfifo /etc/passwd",
    "passwd is large": "dd if=/dev/zero bs=1M count=2 >> /etc/passwd",
}
USERS = ("root", "user", "more", "no-such-user", "0", "1000", "12345", "root:most", "0:most", "more:7", "root:root")


@pytest_asyncio.fixture
async def engine(rig: Rig) -> AsyncIterator[DockerEngine]:
    rig.images.load(IMAGE)
    client = await DockerEngine.connect(rig.engine.url)
    yield client
    await client.close()


@pytest.fixture
def layers(rig: Rig) -> OverlayLayerStore:
    return OverlayLayerStore(None, rig.engine.call("GET", "/info")["DockerRootDir"], local=True)


@pytest.fixture
def created_images(rig: Rig) -> Iterator[list[str]]:
    """Names of images, which are removed at the end of the test."""
    names: list[str] = []
    yield names
    for name in names:
        rig.engine.call("DELETE", f"/images/{name}")


def _image_with_layer(rig: Rig, created_images: list[str], files: dict[str, bytes]) -> str:
    """Load an image that has a layer with `files` above the layer of IMAGE; returns its name."""
    name = f"gpudock-test/accounts-{uuid.uuid4().hex[:12]}"
    layers = (tar_of(IMAGE).read_bytes(), _tar(files))
    digests = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": digests},
    }
    manifest = [{"Config": "config.json", "RepoTags": [f"{name}:latest"], "Layers": ["0.tar", "1.tar"]}]
    archive = _tar(
        {
            "config.json": json.dumps(config).encode(),
            "manifest.json": json.dumps(manifest).encode(),
            "0.tar": layers[0],
            "1.tar": layers[1],
        }
    )
    rig.engine.call("POST", "/images/load", query={"quiet": "1"}, body=io.BytesIO(archive))
    created_images.append(name)
    return name


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _image_after_script(rig: Rig, created_images: list[str], script: str) -> str:
    """Commit an image from a container that ran a shell script; returns its name."""
    name = f"gpudock-test/accounts-{uuid.uuid4().hex[:12]}"
    body = {"Image": IMAGE, "Cmd": ["sh", "-ec", script]}
    container = rig.engine.call("POST", "/containers/create", send=body)["Id"]
    try:
        rig.engine.call("POST", f"/containers/{container}/start")
        assert rig.engine.call("POST", f"/containers/{container}/wait")["StatusCode"] == 0
        rig.engine.call("POST", "/commit", query={"container": container, "repo": name, "tag": "latest"}, send={})
    finally:
        rig.engine.call("DELETE", f"/containers/{container}")
    created_images.append(name)
    return name


def _engine_starts(rig: Rig, image: str, user: str) -> bool:
    """Whether the engine starts a container as this user."""
    body = {"Image": image, "User": user, "Cmd": ["sleep", "0"]}
    container = rig.engine.call("POST", "/containers/create", send=body)["Id"]
    try:
        rig.engine.call("POST", f"/containers/{container}/start")
    except HttpStatusError as refused:
        if "unable to find" not in str(refused):
            raise
        return False
    else:
        return True
    finally:
        rig.engine.call("DELETE", f"/containers/{container}", query={"force": "1"})


@pytest.mark.parametrize("files", deep_except([LAYERS["files replaced"]], LAYERS.values()), ids=LAYERS.keys())
async def test_the_same_users_are_refused_as_by_the_engine(
    rig: Rig, engine: DockerEngine, layers: OverlayLayerStore, created_images: list[str], files: dict[str, bytes]
) -> None:
    name = _image_with_layer(rig, created_images, files)
    image = await engine.image(name)
    assert image
    accounts = await layers.accounts(image)
    assert accounts
    assert {user: not accounts.missing(user) for user in USERS} == {
        user: _engine_starts(rig, name, user) for user in USERS
    }


@pytest.mark.parametrize("script", UNRESOLVABLE.values(), ids=UNRESOLVABLE.keys())
async def test_files_that_cannot_be_read_directly_leave_the_check_to_the_engine(
    rig: Rig, engine: DockerEngine, layers: OverlayLayerStore, created_images: list[str], script: str
) -> None:
    image = await engine.image(_image_after_script(rig, created_images, script))
    assert image
    assert await layers.accounts(image) is None


async def test_inaccessible_layers_leave_the_check_to_the_engine(
    rig: Rig, engine: DockerEngine, layers: OverlayLayerStore
) -> None:
    image = await engine.image(IMAGE)
    assert image
    assert await layers.accounts(image)
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    assert await OverlayLayerStore(None, root, local=False).accounts(image) is None
    assert await OverlayLayerStore(None, "/nowhere", local=True).accounts(image) is None
    assert await layers.accounts(image.model_copy(update={"layer_paths": ()})) is None
    assert await layers.accounts(image.model_copy(update={"layer_paths": ("/etc", *image.layer_paths)})) is None


@pytest.mark.parametrize("validate_only", [True, False])
async def test_a_create_with_a_missing_user_or_group_is_refused(
    caller: Caller, rig: Rig, *, validate_only: bool
) -> None:
    rig.images.load(IMAGE)
    before = rig.engine.call("GET", "/containers/json?all=1")

    def request(user: str) -> container_service_pb2.CreateContainerRequest:
        return container_service_pb2.CreateContainerRequest(
            name="subject", spec=caller.spec(1, user=user), validate_only=validate_only
        )

    for user, missing in (("no-such-user", "user 'no-such-user'"), ("user:no-group", "group 'no-group'")):
        refused = await failure(progress_of(caller.containers.CreateContainer(request(user))))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        assert refused.metadata["fields"] == "spec.user"
        assert f"has no {missing}; use a name of its /etc/passwd and /etc/group, or a number" in refused.message
    assert rig.engine.call("GET", "/containers/json?all=1") == before
    assert await caller.free_gpus() == 8
    assert (await progress_of(caller.containers.CreateContainer(request("user")))).stages


async def test_an_update_to_an_image_without_the_user_is_refused(
    caller: Caller, rig: Rig, created_images: list[str]
) -> None:
    await caller.create("moved", user="user")
    without = _image_with_layer(rig, created_images, LAYERS["files replaced"])
    request = update_request("moved", "image", image=without, files=container_service_pb2.FILES_POLICY_DISCARD)
    refused = await failure(progress_of(caller.containers.UpdateContainer(request)))
    assert (refused.reason, refused.metadata["fields"]) == ("INVALID_ARGUMENT", "spec.user")
    assert await caller.shell("moved", "id -un") == "user\n"
    # If the same update changes the user, the new user is checked.
    discard = {"image": without, "files": container_service_pb2.FILES_POLICY_DISCARD}
    request = update_request("moved", "image,user", user="no-such-user", **discard)
    refused = await failure(progress_of(caller.containers.UpdateContainer(request)))
    assert "has no user 'no-such-user'" in refused.message
    await caller.update("moved", "image,user", user="more", **discard)
    assert await caller.shell("moved", "id -un") == "more\n"
    await caller.delete("moved")


async def test_an_update_to_a_missing_user_is_refused_without_a_restart(caller: Caller) -> None:
    began = (await caller.create("subject")).status.start_time
    for validate_only in (True, False):
        update = update_request("subject", "user", user="more", validate_only=validate_only)
        refused = await failure(progress_of(caller.containers.UpdateContainer(update)))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        assert refused.metadata["fields"] == "spec.user"
        assert "container 'subject' has no user 'more'" in refused.message
        clone = clone_request("subject", "clone", "user", user="more", validate_only=validate_only)
        refused = await failure(progress_of(caller.containers.CloneContainer(clone)))
        assert (refused.reason, refused.metadata["fields"]) == ("INVALID_ARGUMENT", "spec.user")
    assert (await caller.get("subject")).status.start_time == began
    await caller.shell("subject", f"printf '{ADDED_USER.decode().strip()}\n' >> /etc/passwd")
    await caller.clone("subject", "clone", "user", user="more")
    await caller.update("subject", "user", user="more")
    for name in ("subject", "clone"):
        assert await caller.shell(name, "id -un") == "more\n"


def test_redirected_folders_and_metacopies_leave_the_check_to_the_engine(rig: Rig) -> None:
    """Overlayfs sets these attributes on a moved folder (redirect_dir) and on a file without content (metacopy)."""
    for attribute, path in (("trusted.overlay.redirect", "etc"), ("trusted.overlay.metacopy", "etc/passwd")):
        root = rig.folder / uuid.uuid4().hex
        files = root / "overlay2" / ("0" * 64) / "diff"
        (files / "etc").mkdir(parents=True)
        (files / "etc" / "passwd").write_bytes(ADDED_USER)
        known = read_accounts(str(root), [str(files)])
        assert known
        assert known.users == {"more"}
        os.setxattr(files / path, attribute, b"/other")
        assert read_accounts(str(root), [str(files)]) is None
