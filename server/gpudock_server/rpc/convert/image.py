"""Images."""

from __future__ import annotations

from gpudock.v1 import committed_image_pb2

from gpudock_server.model.image import CommittedImage
from gpudock_server.rpc.convert.times import timestamp


def committed_message(image: CommittedImage) -> committed_image_pb2.CommittedImage:
    """An image that a commit made."""
    return committed_image_pb2.CommittedImage(
        id=image.image_id,
        name=image.name,
        size_bytes=image.size_bytes,
        container=image.container,
        revision=image.revision,
        create_time=timestamp(image.create_time),
    )
