"""Calls about images."""

from __future__ import annotations

from pathlib import Path

from gpudock_server.adapters.docker import translate
from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.failures import BAD_REQUEST, CONFLICT, NOT_FOUND, engine_errors
from gpudock_server.adapters.docker.image_editor import ImageEditor
from gpudock_server.adapters.docker.pull import pull
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.errors import EngineRejected
from gpudock_server.model.engine import EngineImage, RegistryAuth
from gpudock_server.model.image_reference import is_image_reference, split_reference
from gpudock_server.ports import Progress


class ImageCalls:
    """The part of DockerEngine that is about images.

    `scratch_dir` is the folder for image layers being edited (None: the system's temporary folder). An image reference
    becomes part of a URL's path, so what is not a reference is never sent.
    """

    def __init__(self, connection: Connection, scratch_dir: Path | None) -> None:
        self._connection = connection
        self._editor = ImageEditor(connection, scratch_dir)

    async def image(self, reference: str) -> EngineImage | None:
        """An image by name or id; None also if `reference` is not a valid reference."""
        if not is_image_reference(reference):
            return None
        call = "inspect an image"
        try:
            answer: Json = await self._connection.call(call, "GET", f"images/{reference}/json")
        except EngineRejected as rejection:
            if rejection.status in (NOT_FOUND, BAD_REQUEST):
                return None
            raise
        with engine_errors(call):
            return translate.image(answer)

    async def image_names(self) -> tuple[str, ...]:
        """The names (`repository:tag`) of all images that have one."""
        call = "list images"
        images: list[Json] = await self._connection.call(call, "GET", "images/json")
        with engine_errors(call):
            return tuple(str(tag) for image in images for tag in image["RepoTags"] or () if tag != "<none>:<none>")

    async def image_ids(self) -> tuple[str, ...]:
        """The ids of all images, also of those without a name."""
        call = "list images"
        images: list[Json] = await self._connection.call(call, "GET", "images/json", params={"all": "1"})
        with engine_errors(call):
            return tuple(str(image["Id"]) for image in images)

    async def pull(self, reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        """Pull an image. Cancelling the call cancels the engine's pull. Raises ImagePullFailed."""
        await pull(self._connection, reference, auth, progress)

    async def tag(self, image: str, reference: str) -> None:
        """Give an image the name `reference`; an image that had this name loses it."""
        for given in (image, reference):
            if not is_image_reference(given):
                detail = f"{given!r} is not a valid image reference"
                raise EngineRejected(call="tag an image", status=BAD_REQUEST, detail=detail)
        name, tag = split_reference(reference)
        await self._connection.call("tag an image", "POST", f"images/{image}/tag", params={"repo": name, "tag": tag})

    async def remove_image(self, reference: str) -> None:
        """Remove an image by name or id; an image in use stays, which is no error.

        Its parents stay as well: containers of users may be based on an untagged parent.
        """
        if not is_image_reference(reference):
            return
        path, params = f"images/{reference}", {"noprune": "1"}
        await self._connection.call_idempotent(
            "remove an image", "DELETE", path, params=params, done_statuses=(NOT_FOUND, CONFLICT)
        )

    async def replace_config(self, image_id: str, other_id: str, reference: str) -> str:
        """Create an image named `reference` with the layers of one image and the config of another; returns its id."""
        return await self._editor.replace_config(image_id, other_id, reference)

    async def strip_identity(self, image_id: str, base_id: str, reference: str) -> str:
        """Create an image named `reference` from a committed image, less what identifies the container; returns its id.

        `base_id` is the image that the container was created from. Left out are gpudock's labels, the NVIDIA variables
        that gpudock sets, the host name and the stream settings.
        """
        return await self._editor.strip_identity(image_id, base_id, reference)

    async def flatten(self, image_id: str, base_layers: int, reference: str, *, config_of: str, onto: str = "") -> str:
        """Create an image named `reference` whose layers above the lowest `base_layers` are merged; returns its id.

        Its config is that of image `config_of`. With `onto`, the merged layer lies on the layers of that image instead.
        Raises LayerCarryFailed for layers that cannot be read or merged, DiskFull.
        """
        return await self._editor.flatten(image_id, base_layers, reference, config_of=config_of, onto=onto)
