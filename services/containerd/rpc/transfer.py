"""``containerd.services.transfer.v1.Transfer``: images from one kind of place to another.

OCIRegistry ───────▶ ImageStore          pull
ImageImportStream ─▶ ImageStore          load
ImageStore ────────▶ ImageStore          tag
ImageStore ────────▶ OCIRegistry         push
ImageStore ────────▶ ImageExportStream   export
ImageImportStream ─▶ ImageExportStream   echo
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.transfer.v1 import transfer_pb2 as pb
from protos.containerd.services.transfer.v1 import transfer_pb2_grpc
from protos.containerd.types.transfer import (
    imagestore_pb2,
    importexport_pb2,
    progress_pb2,
    registry_pb2,
)
from services.common.errors import Cancelled, InvalidArgument, Unimplemented
from services.common.server import request_namespace
from services.containerd.content.descriptor import Platform
from services.containerd.images.archive_writer import ExportOptions
from services.containerd.images.platform import host_platform, ordered, runnable_on
from services.containerd.images.reference import parse_reference
from services.containerd.remotes.remote import Credentials, RegistryAccess
from services.containerd.rpc.encoding import to_descriptor
from services.containerd.rpc.streaming import receive_bytes, send_bytes, unpack
from services.containerd.transfer.destination import Destination, ExtraName, Unpacking
from services.containerd.transfer.progress import report_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from google.protobuf.any_pb2 import Any

    from protos.containerd.types import platform_pb2
    from services.containerd.remotes.remote import Registries, Remote
    from services.containerd.rpc.context import Context
    from services.containerd.rpc.streaming import OpenStream, StreamRegister
    from services.containerd.transfer.progress import Progress, Report
    from services.containerd.transfer.transfers import Transfers

log = structlog.get_logger(__name__)

_REGISTRY = registry_pb2.OCIRegistry.DESCRIPTOR.full_name
_STORE = imagestore_pb2.ImageStore.DESCRIPTOR.full_name
_IMPORT = importexport_pb2.ImageImportStream.DESCRIPTOR.full_name
_EXPORT = importexport_pb2.ImageExportStream.DESCRIPTOR.full_name

_REPORTS_WAITING = 10_000
_LAST_REPORTS_S = 5.0
_CREDENTIALS_S = 60.0


class TransferService(transfer_pb2_grpc.TransferServicer):
    """Serves transfers.

    Args:
        transfers: does them.
        registries: opens registries.
        streams: where clients' streams are.
    """

    def __init__(
        self, transfers: Transfers, registries: Registries, streams: StreamRegister
    ) -> None:
        self._transfers = transfers
        self._registries = registries
        self._streams = streams
        self._kinds = {
            (_REGISTRY, _STORE): self._pull,
            (_IMPORT, _STORE): self._load,
            (_STORE, _EXPORT): self._export,
            (_STORE, _REGISTRY): self._push,
            (_STORE, _STORE): self._tag,
            (_IMPORT, _EXPORT): self._echo,
        }

    async def Transfer(self, request: pb.TransferRequest, context: Context) -> Empty:
        """See the contract."""
        namespace = request_namespace(context)
        names = _name(request.source), _name(request.destination)
        do = self._kinds.get(names)
        if do is None:
            source, destination = (name or "nothing" for name in names)
            raise Unimplemented(f"method Transfer not implemented for {source} to {destination}")
        async with self._report(namespace, request.options.progress_stream) as report:
            await do(namespace, request.source, request.destination, report)
        return Empty()

    async def _pull(self, namespace: str, source: Any, target: Any, report: Report) -> None:
        registry = unpack(source, registry_pb2.OCIRegistry)
        destination = _destination(unpack(target, imagestore_pb2.ImageStore))
        async with self._remote(namespace, registry) as remote:
            await self._transfers.pull(namespace, remote, destination, report)

    async def _load(self, namespace: str, source: Any, target: Any, report: Report) -> None:
        archive = unpack(source, importexport_pb2.ImageImportStream)
        destination = _destination(unpack(target, imagestore_pb2.ImageStore))
        stream = self._streams.get(namespace, archive.stream)
        try:
            async with aclosing(receive_bytes(stream)) as data:
                await self._transfers.load(
                    namespace, data, destination, report, compress=archive.force_compress
                )
        finally:
            await stream.close()

    async def _export(self, namespace: str, source: Any, target: Any, report: Report) -> None:
        store = unpack(source, imagestore_pb2.ImageStore)
        archive = unpack(target, importexport_pb2.ImageExportStream)
        stream = self._streams.get(namespace, archive.stream)
        try:
            async with aclosing(
                self._transfers.export(
                    namespace,
                    store.name,
                    [_extra_name(reference) for reference in store.extra_references],
                    _export_options(archive),
                    report,
                )
            ) as data:
                await send_bytes(stream, data)
        finally:
            await stream.close()

    async def _push(self, namespace: str, source: Any, target: Any, report: Report) -> None:
        store = unpack(source, imagestore_pb2.ImageStore)
        registry = unpack(target, registry_pb2.OCIRegistry)
        async with self._remote(namespace, registry) as remote:
            await self._transfers.push(
                namespace, store.name, remote, report, platforms=_platforms(store.platforms)
            )

    async def _tag(self, namespace: str, source: Any, target: Any, report: Report) -> None:
        store = unpack(source, imagestore_pb2.ImageStore)
        destination = _destination(unpack(target, imagestore_pb2.ImageStore))
        await self._transfers.tag(namespace, store.name, destination)

    async def _echo(self, namespace: str, source: Any, target: Any, report: Report) -> None:
        """Send back what comes; clients try their streams with it."""
        archive = unpack(source, importexport_pb2.ImageImportStream)
        inbound = self._streams.get(namespace, archive.stream)
        export = unpack(target, importexport_pb2.ImageExportStream)
        outbound = self._streams.get(namespace, export.stream)
        try:
            async with aclosing(receive_bytes(inbound)) as data:
                await send_bytes(outbound, data)
        finally:
            await inbound.close()
            await outbound.close()

    @asynccontextmanager
    async def _remote(
        self, namespace: str, registry: registry_pb2.OCIRegistry
    ) -> AsyncIterator[Remote]:
        """The registry of a request, with the credentials that its stream gives."""
        reference = parse_reference(registry.reference)
        resolver = registry.resolver
        if resolver.host_dir and not Path(resolver.host_dir).is_absolute():
            raise InvalidArgument(
                f"host_dir {resolver.host_dir!r} must be an absolute path of this machine",
                field="source.resolver.host_dir",
            )
        async with AsyncExitStack() as stack:
            credentials = None
            if resolver.auth_stream:
                stream = self._streams.get(namespace, resolver.auth_stream)
                stack.push_async_callback(stream.close)
                credentials = _CredentialStream(stream, registry.reference).ask
            if resolver.logs_stream:  # its reader is waiting for the end; the traffic is in our log
                stack.push_async_callback(self._streams.get(namespace, resolver.logs_stream).close)
            access = RegistryAccess(
                credentials=credentials,
                headers=dict(resolver.headers),
                default_scheme=resolver.default_scheme,
                hosts=(Path(resolver.host_dir),) if resolver.host_dir else (),
            )
            yield self._registries.open(reference, access)

    @asynccontextmanager
    async def _report(self, namespace: str, stream_id: str) -> AsyncIterator[Report]:
        """Where to report to: a client's stream, or nowhere."""
        if not stream_id:
            yield report_nothing
            return
        stream = self._streams.get(namespace, stream_id)
        reports = _ReportQueue()
        sending = asyncio.create_task(reports.send(stream), name="progress stream")
        try:
            yield reports.put
        finally:
            reports.end()
            await asyncio.wait([sending], timeout=_LAST_REPORTS_S)
            sending.cancel()
            await asyncio.wait([sending])


class _ReportQueue:
    """Reports on their way to a client; the oldest are dropped if that does not keep up."""

    def __init__(self) -> None:
        self._waiting: deque[Progress] = deque(maxlen=_REPORTS_WAITING)
        self._changed = asyncio.Event()
        self._ended = False

    def put(self, progress: Progress) -> None:
        self._waiting.append(progress)
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    async def send(self, stream: OpenStream) -> None:
        try:
            while self._waiting or not self._ended:
                await self._changed.wait()
                self._changed.clear()
                while self._waiting:
                    await stream.send(_progress_to_pb(self._waiting.popleft()))
            await stream.close()
        except Cancelled:  # nobody wants to hear of it; the transfer goes on
            log.debug("progress stream was ended by the client")


class _CredentialStream:
    """Asks the client of a transfer for credentials, one question at a time."""

    def __init__(self, stream: OpenStream, reference: str) -> None:
        self._stream = stream
        self._reference = reference
        self._one_at_a_time = asyncio.Lock()

    async def ask(self, host: str) -> Credentials:
        async with self._one_at_a_time, asyncio.timeout(_CREDENTIALS_S):
            await self._stream.send(registry_pb2.AuthRequest(host=host, reference=self._reference))
            value = await self._stream.receive()
        if value is None:
            raise Cancelled(f"the client gave no credentials for {host}")
        answer = unpack(value, registry_pb2.AuthResponse)
        match answer.authType:
            case registry_pb2.AuthType.CREDENTIALS:
                return Credentials(username=answer.username, secret=answer.secret)
            case registry_pb2.AuthType.REFRESH:
                return Credentials(refresh_token=answer.secret)
            case registry_pb2.AuthType.HEADER:
                return Credentials(header=answer.secret)
        return Credentials()


def _name(value: Any) -> str:
    return value.type_url.rpartition("/")[2]


def _destination(store: imagestore_pb2.ImageStore) -> Destination:
    return Destination(
        name=store.name,
        labels=dict(store.labels),
        platforms=_platforms(store.platforms),
        all_metadata=store.all_metadata,
        manifest_limit=store.manifest_limit,
        extra_names=tuple(_extra_name(reference) for reference in store.extra_references),
        unpackings=tuple(
            Unpacking(
                platform=_platform(unpacking.platform) if unpacking.platform.architecture else None,
                snapshotter=unpacking.snapshotter,
            )
            for unpacking in store.unpacks
        ),
    )


def _extra_name(reference: imagestore_pb2.ImageReference) -> ExtraName:
    return ExtraName(
        name=reference.name,
        is_prefix=reference.is_prefix,
        allow_overwrite=reference.allow_overwrite,
        add_digest=reference.add_digest,
        skip_named_digest=reference.skip_named_digest,
    )


def _export_options(archive: importexport_pb2.ImageExportStream) -> ExportOptions:
    wanted = _platforms(archive.platforms)
    return ExportOptions(
        matcher=ordered(wanted) if wanted else runnable_on(host_platform()),
        all_platforms=archive.all_platforms,
        docker=not archive.skip_compatibility_manifest,
        non_distributable=not archive.skip_non_distributable,
    )


def _platforms(messages: Iterable[platform_pb2.Platform]) -> tuple[Platform, ...]:
    return tuple(_platform(message) for message in messages)


def _platform(message: platform_pb2.Platform) -> Platform:
    return Platform(
        os=message.os,
        architecture=message.architecture,
        variant=message.variant,
        os_version=message.os_version,
        os_features=tuple(message.os_features),
    )


def _progress_to_pb(progress: Progress) -> progress_pb2.Progress:
    return progress_pb2.Progress(
        event=progress.event,
        name=progress.name,
        parents=progress.parents,
        progress=progress.progress,
        total=progress.total,
        desc=None if progress.descriptor is None else to_descriptor(progress.descriptor),
    )
