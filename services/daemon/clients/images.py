"""containerd's image names and content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2 as pb
from protos.containerd.services.images.v1 import images_pb2_grpc
from protos.containerd.types import descriptor_pb2
from services.common.errors import AlreadyExists, DataLoss, NotFound
from services.daemon.clients.connection import TIMEOUT_S
from services.daemon.images.node import Descriptor, NamedImage

if TYPE_CHECKING:
    from services.daemon.clients.connection import Connection

_COLLECT_TIMEOUT_S = 120.0


class ContainerdImages:
    """:class:`services.daemon.images.node.ImageNames` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = images_pb2_grpc.ImagesStub(connection.channel)

    async def list_all(self) -> list[NamedImage]:
        """See the interface."""
        with self._connection.calls():
            answer = await self._stub.List(pb.ListImagesRequest(), timeout=TIMEOUT_S)
        return [_from_pb(image) for image in answer.images]

    async def get(self, name: str) -> NamedImage | None:
        """See the interface."""
        try:
            with self._connection.calls():
                answer = await self._stub.Get(pb.GetImageRequest(name=name), timeout=TIMEOUT_S)
        except NotFound:
            return None
        return _from_pb(answer.image)

    async def put(self, image: NamedImage) -> None:
        """See the interface."""
        message = pb.Image(
            name=image.name,
            labels=image.labels,
            target=descriptor_pb2.Descriptor(
                media_type=image.target.media_type,
                digest=image.target.digest,
                size=image.target.size_bytes,
            ),
        )
        try:
            with self._connection.calls():
                await self._stub.Create(pb.CreateImageRequest(image=message), timeout=TIMEOUT_S)
        except AlreadyExists:
            with self._connection.calls():
                await self._stub.Update(pb.UpdateImageRequest(image=message), timeout=TIMEOUT_S)

    async def delete(self, name: str, *, collect: bool) -> None:
        """See the interface."""
        request = pb.DeleteImageRequest(name=name, sync=collect)
        try:
            with self._connection.calls():
                await self._stub.Delete(request, timeout=_COLLECT_TIMEOUT_S)
        except NotFound:
            return


class ContainerdContent:
    """:class:`services.daemon.images.node.Content` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = content_pb2_grpc.ContentStub(connection.channel)

    async def read(self, digest: str, *, limit_bytes: int) -> bytes:
        """See the interface."""
        request = content_pb2.ReadContentRequest(digest=digest)
        pieces: list[bytes] = []
        total = 0
        with self._connection.calls():
            call = self._stub.Read(request, timeout=TIMEOUT_S)
            try:
                async for answer in call:
                    pieces.append(answer.data)
                    total += len(answer.data)
                    if total > limit_bytes:
                        raise DataLoss(
                            f"blob {digest} is larger than the {limit_bytes} bytes that a "
                            "manifest or a configuration may have",
                            resource=("blob", digest),
                        )
            finally:
                call.cancel()
        return b"".join(pieces)


def _from_pb(image: pb.Image) -> NamedImage:
    return NamedImage(
        name=image.name,
        target=Descriptor(image.target.media_type, image.target.digest, image.target.size),
        updated_at_ns=image.updated_at.ToNanoseconds(),
        labels=dict(image.labels),
    )
