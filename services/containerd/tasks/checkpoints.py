"""Checkpoints as content: the directory that the runtime saved, as a tar in the content store.

Media types and the two blobs (state, and the container's spec) are upstream's, so that a checkpoint
taken here can be pushed and restored elsewhere.
"""

from __future__ import annotations

import asyncio
import shutil
import tarfile
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, DataLoss, InvalidArgument
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.store import CHUNK_BYTES
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.content.store import ContentStore

MEDIA_TYPE_STATE = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
MEDIA_TYPE_SPEC = "application/vnd.containerd.container.checkpoint.config.v1+proto"


class Checkpoints:
    """Moves checkpoints between directories and the content store.

    Args:
        content: where they are kept.
        scratch: directory for those under way.
    """

    def __init__(self, content: ContentStore, scratch: Path) -> None:
        self._content = content
        self._scratch = scratch

    @asynccontextmanager
    async def directory(self) -> AsyncIterator[Path]:
        """An empty directory, gone at the end."""
        path = await uninterrupted(asyncio.to_thread(self._make))
        try:
            yield path
        finally:
            await uninterrupted(asyncio.to_thread(shutil.rmtree, path))

    @asynccontextmanager
    async def restored(self, namespace: str, descriptor: Descriptor) -> AsyncIterator[Path]:
        """A checkpoint out of the content store, as a directory.

        Raises:
            InvalidArgument: the descriptor is of something else.
            NotFound: the namespace has no such blob.
            DataLoss: the blob is no archive, or climbs out of its directory.
        """
        if descriptor.media_type != MEDIA_TYPE_STATE:
            raise InvalidArgument(
                f"checkpoint of media type '{descriptor.media_type}' is not {MEDIA_TYPE_STATE}",
                field="checkpoint",
            )
        blob = await self._content.path(namespace, descriptor.digest)
        async with self.directory() as path:
            await uninterrupted(asyncio.to_thread(_unpack, blob, path))
            yield path

    async def save(self, namespace: str, path: Path, spec: bytes) -> list[Descriptor]:
        """Keep a checkpoint's directory, and the spec (a serialized Any) that it was made with."""
        async with self.directory() as scratch:
            archive = scratch / "state.tar"
            await uninterrupted(asyncio.to_thread(_pack, path, archive))
            state = await self._write(namespace, MEDIA_TYPE_STATE, str(path), archive)
        async with self.directory() as scratch:
            document = scratch / "spec"
            await asyncio.to_thread(document.write_bytes, spec)
            config = await self._write(namespace, MEDIA_TYPE_SPEC, f"{path}/spec", document)
        return [state, config]

    def _make(self) -> Path:
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self._scratch))

    async def _write(self, namespace: str, media_type: str, ref: str, path: Path) -> Descriptor:
        size_bytes = 0
        async with await self._content.writer(namespace, ref) as writer:
            with path.open("rb") as file:
                while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    await writer.write(chunk)
                    size_bytes += len(chunk)
            digest = writer.digest
            with suppress(AlreadyExists):
                await writer.commit(media_type=media_type)
        return Descriptor(media_type, digest, size_bytes)


def _pack(directory: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for path in sorted(directory.rglob("*")):
            tar.add(path, arcname=str(path.relative_to(directory)), recursive=False)


def _unpack(archive: Path, directory: Path) -> None:
    """Make the files of an archive anew, whatever else it may say of them.

    Not by ``extractall``: what it lets pass is told by a filter that Debian 12's Python does not
    have.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack_member(tar, member, directory)
    except (tarfile.TarError, FileExistsError, IsADirectoryError) as error:
        raise DataLoss(f"checkpoint cannot be unpacked: {error}") from error


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
        raise DataLoss(
            f"checkpoint cannot be unpacked: '{member.name}' is not a file or directory within it"
        )
    path = directory / name
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None  # it is a regular file
    with source, path.open("xb") as target:
        shutil.copyfileobj(source, target)
