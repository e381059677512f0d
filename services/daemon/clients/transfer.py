"""containerd's transfers: pull and import, with progress and data over its streaming service."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2

from protos.containerd.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from protos.containerd.services.transfer.v1 import transfer_pb2, transfer_pb2_grpc
from protos.containerd.types import platform_pb2
from protos.containerd.types.transfer import (
    imagestore_pb2,
    importexport_pb2,
    progress_pb2,
    registry_pb2,
)
from protos.containerd.types.transfer import (
    streaming_pb2 as data_pb2,
)
from services.common.errors import Cancelled, TheseusError, Unavailable
from services.daemon.clients.connection import end_call
from services.daemon.images.node import TransferProgress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from google.protobuf.message import Message

    from services.daemon.clients.connection import Connection
    from services.daemon.images.node import Platform, RegistryCredentials

    Stream = grpc.aio.StreamStreamCall[any_pb2.Any, any_pb2.Any]

_TRANSFER_TIMEOUT_S = 3600.0
_OPEN_TIMEOUT_S = 30.0
_REST_TIMEOUT_S = 5.0
_PIECE_BYTES = 32 * 1024  # what containerd sends itself at most in one message


class ContainerdTransfer:
    """:class:`services.daemon.images.node.ImageTransfer` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._transfer = transfer_pb2_grpc.TransferStub(connection.channel)
        self._streaming = streaming_pb2_grpc.StreamingStub(connection.channel)

    async def pull(
        self,
        reference: str,
        *,
        platform: Platform,
        snapshotter: str,
        progress: Callable[[TransferProgress], None],
        credentials: RegistryCredentials | None = None,
    ) -> None:
        """See the interface."""
        wanted = _platform(platform)
        store = imagestore_pb2.ImageStore(
            name=reference,
            platforms=[wanted],
            unpacks=[_unpack(wanted, snapshotter)],
        )
        async with self._source(reference, credentials) as source:
            await self._run(source, store, progress)

    async def load(
        self,
        archive: AsyncIterator[bytes],
        *,
        untagged: str,
        platform: Platform,
        snapshotter: str,
        progress: Callable[[TransferProgress], None],
    ) -> None:
        """See the interface."""
        store = imagestore_pb2.ImageStore(
            extra_references=[
                imagestore_pb2.ImageReference(
                    name=untagged,
                    is_prefix=True,
                    allow_overwrite=True,
                    add_digest=True,
                    skip_named_digest=True,
                )
            ],
            unpacks=[_unpack(_platform(platform), snapshotter)],
        )
        async with self._stream() as (stream, identity):
            sending = asyncio.create_task(_send(stream, archive), name="import-data")
            try:
                source = importexport_pb2.ImageImportStream(stream=identity)
                await self._run(source, store, progress, sending)
            finally:
                sending.cancel()
                with suppress(asyncio.CancelledError, TheseusError, grpc.aio.AioRpcError):
                    await sending

    @asynccontextmanager
    async def _source(
        self, reference: str, credentials: RegistryCredentials | None
    ) -> AsyncIterator[registry_pb2.OCIRegistry]:
        """A registry, with somebody who answers when it wants to know who asks."""
        if credentials is None:
            yield registry_pb2.OCIRegistry(reference=reference)
            return
        hosts = _hosts(reference)
        async with self._stream() as (stream, identity):
            answering = asyncio.create_task(
                _answer(stream, hosts, credentials), name="registry-credentials"
            )
            try:
                resolver = registry_pb2.RegistryResolver(auth_stream=identity)
                yield registry_pb2.OCIRegistry(reference=reference, resolver=resolver)
            finally:
                answering.cancel()
                with suppress(asyncio.CancelledError):
                    await answering

    async def _run(
        self,
        source: Message,
        destination: Message,
        progress: Callable[[TransferProgress], None],
        sending: asyncio.Task[None] | None = None,
    ) -> None:
        async with self._stream() as (stream, identity):
            request = transfer_pb2.TransferRequest(
                source=_pack(source),
                destination=_pack(destination),
                options=transfer_pb2.TransferOptions(progress_stream=identity),
            )
            reading = asyncio.create_task(_report(stream, progress), name="transfer-progress")
            try:
                with self._connection.calls():
                    call = self._transfer.Transfer(request, timeout=_TRANSFER_TIMEOUT_S)
                    if sending is not None:
                        # A client that breaks off must end the transfer, not leave it waiting.
                        sending.add_done_callback(lambda done: _failed(done) and call.cancel())
                    try:
                        await call
                    except asyncio.CancelledError:
                        if sending is not None and _failed(sending):
                            await sending
                        raise
                # containerd closes the stream once everything was said.
                await asyncio.wait([reading], timeout=_REST_TIMEOUT_S)
            except TheseusError:
                if sending is not None and _failed(sending):
                    await sending  # the cause, not the effect
                raise
            finally:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[tuple[Stream, str]]:
        """A stream of the streaming service that containerd knows by the id returned."""
        identity = f"daemon-{secrets.token_hex(16)}"
        call = self._streaming.Stream()
        try:
            with self._connection.calls():
                async with asyncio.timeout(_OPEN_TIMEOUT_S):
                    await call.write(_pack(streaming_pb2.StreamInit(id=identity)))
                    if await call.read() is grpc.aio.EOF:  # the answer says: ready
                        raise Unavailable("containerd refused a stream: it is being restarted")
            yield call, identity
        finally:
            await end_call(call)


async def _send(stream: Stream, archive: AsyncIterator[bytes]) -> None:
    """Send an archive within the window that the receiver grants, then close our side."""
    window = 0
    async for piece in archive:
        rest = memoryview(piece)
        while rest:
            while window <= 0:
                granted = await stream.read()
                if not isinstance(granted, any_pb2.Any):
                    return  # the receiver has enough; the transfer's own answer says why
                window += data_pb2.WindowUpdate.FromString(granted.value).update
            part = rest[: min(len(rest), window, _PIECE_BYTES)]
            await stream.write(_pack(data_pb2.Data(data=bytes(part))))
            window -= len(part)
            rest = rest[len(part) :]
    await stream.done_writing()


async def _answer(stream: Stream, hosts: frozenset[str], credentials: RegistryCredentials) -> None:
    """Give the credentials to each of ``hosts`` that asks; to others, none."""
    # A stream that breaks is no news here: the transfer ends with an error of its own.
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while isinstance(asked := await stream.read(), any_pb2.Any):
            host = registry_pb2.AuthRequest.FromString(asked.value).host
            answer = _auth_response(credentials) if host in hosts else registry_pb2.AuthResponse()
            await stream.write(_pack(answer))


def _hosts(reference: str) -> frozenset[str]:
    """The hosts that are the registry of a full reference, as containerd calls them."""
    domain = reference.partition("/")[0]
    return frozenset({domain, "registry-1.docker.io"} if domain == "docker.io" else {domain})


def _auth_response(credentials: RegistryCredentials) -> registry_pb2.AuthResponse:
    if credentials.registry_token:
        return registry_pb2.AuthResponse(
            authType=registry_pb2.HEADER, secret=f"Bearer {credentials.registry_token}"
        )
    if credentials.identity_token:
        return registry_pb2.AuthResponse(
            authType=registry_pb2.REFRESH, secret=credentials.identity_token
        )
    return registry_pb2.AuthResponse(
        authType=registry_pb2.CREDENTIALS,
        username=credentials.username,
        secret=credentials.password,
    )


async def _report(stream: Stream, progress: Callable[[TransferProgress], None]) -> None:
    # What is lost here is only a report: the transfer itself says how it went.
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while isinstance(answer := await stream.read(), any_pb2.Any):
            message = progress_pb2.Progress.FromString(answer.value)
            progress(
                TransferProgress(
                    event=message.event,
                    name=message.name,
                    digest=message.desc.digest,
                    media_type=message.desc.media_type,
                    current_bytes=message.progress,
                    total_bytes=message.total,
                )
            )


def _failed(task: asyncio.Task[None]) -> bool:
    if not task.done() or task.cancelled():
        return False
    error = task.exception()
    # gRPC's own complaint about the stream comes second to what the transfer says.
    return error is not None and not isinstance(
        error, grpc.aio.AioRpcError | asyncio.InvalidStateError | Cancelled
    )


def _platform(platform: Platform) -> platform_pb2.Platform:
    return platform_pb2.Platform(
        os=platform.os, architecture=platform.architecture, variant=platform.variant
    )


def _unpack(
    platform: platform_pb2.Platform, snapshotter: str
) -> imagestore_pb2.UnpackConfiguration:
    return imagestore_pb2.UnpackConfiguration(platform=platform, snapshotter=snapshotter)


def _pack(message: Message) -> any_pb2.Any:
    """Pack under containerd's bare type URL."""
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())
