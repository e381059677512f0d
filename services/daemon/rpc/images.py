"""``theseus.engine.v1.Images``."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import images_pb2 as pb
from protos.theseus.engine.v1 import images_pb2_grpc
from services.daemon.images.image import Image
from services.daemon.images.node import RegistryCredentials
from services.daemon.rpc.messages import timestamp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.daemon.images.store import ImageStore
    from services.daemon.rpc.context import Context


class ImagesService(images_pb2_grpc.ImagesServicer):
    """Serves images."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images

    async def Pull(
        self, request: pb.PullImageRequest, context: Context
    ) -> AsyncIterator[pb.PullImageResponse]:
        """See the contract."""
        credentials = _credentials(request.credentials) if request.HasField("credentials") else None
        pulling = self._images.pull(request.reference, request.platform, credentials)
        async with aclosing(pulling) as reports:
            async for report in reports:
                if isinstance(report, Image):
                    yield pb.PullImageResponse(image=_to_pb(report))
                    continue
                layers = [
                    pb.LayerProgress(
                        name=layer.name,
                        status=layer.status,
                        current_bytes=layer.current_bytes,
                        total_bytes=layer.total_bytes,
                    )
                    for layer in report
                ]
                yield pb.PullImageResponse(layers=layers)

    async def Load(
        self, request_iterator: AsyncIterator[pb.LoadImageRequest], context: Context
    ) -> pb.LoadImageResponse:
        """See the contract."""
        images = await self._images.load(_pieces(request_iterator))
        return pb.LoadImageResponse(images=[_to_pb(image) for image in images])

    async def List(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        """See the contract."""
        images = await self._images.list_all()
        return pb.ListImagesResponse(images=[_to_pb(image) for image in images])

    async def Remove(
        self, request: pb.RemoveImageRequest, context: Context
    ) -> pb.RemoveImageResponse:
        """See the contract."""
        removed = await self._images.remove(request.image, force=request.force)
        return pb.RemoveImageResponse(untagged=removed.untagged, deleted=removed.deleted)

    async def Get(self, request: pb.GetImageRequest, context: Context) -> pb.GetImageResponse:
        """See the contract."""
        image = await self._images.get(request.image)
        answer = pb.GetImageResponse(image=_to_pb(image))
        answer.image.config = image.raw_config
        return answer


async def _pieces(requests: AsyncIterator[pb.LoadImageRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request.data


def _credentials(message: pb.RegistryCredentials) -> RegistryCredentials:
    return RegistryCredentials(
        username=message.username,
        password=message.password,
        identity_token=message.identity_token,
        registry_token=message.registry_token,
    )


def _to_pb(image: Image) -> pb.Image:
    return pb.Image(
        id=image.id,
        references=image.references,
        digest=image.digest,
        size_bytes=image.size_bytes,
        created_at=timestamp(image.created_at_ns),
        platform=image.platform,
        unpacked_bytes=image.unpacked_bytes,
    )
