"""``containerd.services.content.v1.Content``: blobs, and the writes under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.content.v1 import content_pb2 as pb
from protos.containerd.services.content.v1 import content_pb2_grpc
from services.common.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange
from services.common.server import request_namespace
from services.containerd.content.digest import split_digest
from services.containerd.rpc.encoding import timestamp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.content.store import (
        ContentInfo,
        ContentStore,
        ContentWriter,
        IngestStatus,
    )
    from services.containerd.rpc.context import Context

_INFOS_PER_MESSAGE = 100


class ContentService(content_pb2_grpc.ContentServicer):
    """Serves a content store."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """See the contract."""
        info = await self._store.info(request_namespace(context), request.digest)
        return pb.InfoResponse(info=_info_to_pb(info))

    async def Update(self, request: pb.UpdateRequest, context: Context) -> pb.UpdateResponse:
        """See the contract."""
        info = await self._store.update(
            request_namespace(context),
            request.info.digest,
            dict(request.info.labels),
            list(request.update_mask.paths),
        )
        return pb.UpdateResponse(info=_info_to_pb(info))

    async def List(
        self, request: pb.ListContentRequest, context: Context
    ) -> AsyncIterator[pb.ListContentResponse]:
        """See the contract."""
        found = await self._store.find(request_namespace(context), request.filters)
        for begin in range(0, len(found), _INFOS_PER_MESSAGE):
            part = found[begin : begin + _INFOS_PER_MESSAGE]
            yield pb.ListContentResponse(info=map(_info_to_pb, part))

    async def Delete(self, request: pb.DeleteContentRequest, context: Context) -> Empty:
        """See the contract."""
        await self._store.delete(request_namespace(context), request.digest)
        return Empty()

    async def Read(
        self, request: pb.ReadContentRequest, context: Context
    ) -> AsyncIterator[pb.ReadContentResponse]:
        """See the contract. Offsets in responses count from where the request begins."""
        sent = 0
        async for chunk in self._store.chunks(
            request_namespace(context),
            request.digest,
            offset=max(request.offset, 0),
            size_bytes=max(request.size, 0),
        ):
            yield pb.ReadContentResponse(offset=sent, data=chunk)
            sent += len(chunk)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """See the contract."""
        status = await self._store.status(request_namespace(context), request.ref)
        return pb.StatusResponse(status=_status_to_pb(status))

    async def ListStatuses(
        self, request: pb.ListStatusesRequest, context: Context
    ) -> pb.ListStatusesResponse:
        """See the contract."""
        found = await self._store.statuses(request_namespace(context), request.filters)
        return pb.ListStatusesResponse(statuses=map(_status_to_pb, found))

    async def Write(
        self, request_iterator: AsyncIterator[pb.WriteContentRequest], context: Context
    ) -> AsyncIterator[pb.WriteContentResponse]:
        """See the contract."""
        request = await anext(request_iterator, None)
        if request is None or not request.ref:
            raise InvalidArgument("first message must have a reference", field="ref")
        namespace = request_namespace(context)
        writer = await self._store.writer(
            namespace, request.ref, total_bytes=max(request.total, 0), expected=request.expected
        )
        async with writer:
            session = _WriteSession(self._store, namespace, request.ref, writer)
            while request is not None:
                yield await session.answer(request)
                if request.action == pb.WriteAction.COMMIT:
                    return
                request = await anext(request_iterator, None)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> Empty:
        """See the contract."""
        await self._store.abort(request_namespace(context), request.ref)
        return Empty()


class _WriteSession:
    """The messages of one Write: what was said of digest and size counts until said anew."""

    def __init__(
        self, store: ContentStore, namespace: str, ref: str, writer: ContentWriter
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._ref = ref
        self._writer = writer
        self._total = 0
        self._expected = ""

    async def answer(self, request: pb.WriteContentRequest) -> pb.WriteContentResponse:
        if request.expected:
            split_digest(request.expected, field="expected")
            self._expected = request.expected
            await self._check_absent()
        self._total = request.total if request.total > 0 else self._total
        if request.action != pb.WriteAction.STAT:
            await self._write(request)
        digest = self._writer.digest
        if request.action == pb.WriteAction.COMMIT:
            info = await self._writer.commit(
                size_bytes=self._total, expected=self._expected, labels=dict(request.labels)
            )
            digest = info.digest
        status = self._writer.status()
        response = pb.WriteContentResponse(
            action=request.action, offset=status.offset_bytes, digest=digest
        )
        if request.action == pb.WriteAction.STAT:
            response.started_at.FromNanoseconds(status.started_at_ns)
            response.updated_at.FromNanoseconds(status.updated_at_ns)
            response.total = self._total or status.total_bytes
        return response

    async def _write(self, request: pb.WriteContentRequest) -> None:
        offset = self._writer.offset_bytes
        if request.offset not in (0, offset):
            raise OutOfRange(
                f"write @{request.offset} must occur at current offset {offset}", field="offset"
            )
        if request.action == pb.WriteAction.COMMIT and not request.data:
            return
        if request.offset == 0 and offset > 0:
            await self._writer.truncate()
        if request.data:
            await self._writer.write(request.data)

    async def _check_absent(self) -> None:
        """End the write if another one made the blob meanwhile."""
        try:
            await self._store.info(self._namespace, self._expected)
        except NotFound:
            return
        await self._store.abort(self._namespace, self._ref)
        raise AlreadyExists(
            f"blob with expected digest {self._expected} exists",
            resource=("content", self._expected),
        )


def _info_to_pb(info: ContentInfo) -> pb.Info:
    return pb.Info(
        digest=info.digest,
        size=info.size_bytes,
        created_at=timestamp(info.created_at_ns),
        updated_at=timestamp(info.updated_at_ns),
        labels=dict(info.labels),
    )


def _status_to_pb(status: IngestStatus) -> pb.Status:
    return pb.Status(
        started_at=timestamp(status.started_at_ns),
        updated_at=timestamp(status.updated_at_ns),
        ref=status.ref,
        offset=status.offset_bytes,
        total=status.total_bytes,
        expected=status.expected,
    )
