"""``containerd.services.images.v1.Images``: names of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.images.v1 import images_pb2 as pb
from protos.containerd.services.images.v1 import images_pb2_grpc
from services.common.server import request_namespace
from services.containerd.images.store import Image
from services.containerd.rpc.encoding import (
    from_descriptor,
    nanoseconds,
    timestamp,
    to_descriptor,
)

if TYPE_CHECKING:
    from services.containerd.images.store import ImageStore
    from services.containerd.rpc.context import Context


class ImagesService(images_pb2_grpc.ImagesServicer):
    """Serves an image store."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def Get(self, request: pb.GetImageRequest, context: Context) -> pb.GetImageResponse:
        """See the contract."""
        image = await self._store.get(request_namespace(context), request.name)
        return pb.GetImageResponse(image=to_pb(image))

    async def List(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        """See the contract."""
        found = await self._store.find(request_namespace(context), request.filters)
        return pb.ListImagesResponse(images=map(to_pb, found))

    async def Create(
        self, request: pb.CreateImageRequest, context: Context
    ) -> pb.CreateImageResponse:
        """See the contract."""
        image = from_pb(request.image, at_ns=nanoseconds(request.source_date_epoch))
        created = await self._store.create(request_namespace(context), image)
        return pb.CreateImageResponse(image=to_pb(created))

    async def Update(
        self, request: pb.UpdateImageRequest, context: Context
    ) -> pb.UpdateImageResponse:
        """See the contract."""
        image = from_pb(request.image, at_ns=nanoseconds(request.source_date_epoch))
        updated = await self._store.update(
            request_namespace(context), image, request.update_mask.paths
        )
        return pb.UpdateImageResponse(image=to_pb(updated))

    async def Delete(self, request: pb.DeleteImageRequest, context: Context) -> Empty:
        """See the contract."""
        await self._store.delete(
            request_namespace(context),
            request.name,
            target_digest=request.target.digest,
            sync=request.sync,
        )
        return Empty()


def to_pb(image: Image) -> pb.Image:
    """An image on the wire."""
    return pb.Image(
        name=image.name,
        labels=dict(image.labels),
        target=to_descriptor(image.target),
        created_at=timestamp(image.created_at_ns),
        updated_at=timestamp(image.updated_at_ns),
    )


def from_pb(message: pb.Image, *, at_ns: int = 0) -> Image:
    """An image off the wire. Its times are not the client's to set, but for ``at_ns``."""
    return Image(
        name=message.name,
        target=from_descriptor(message.target),
        labels=dict(message.labels),
        created_at_ns=at_ns,
        updated_at_ns=at_ns,
    )
