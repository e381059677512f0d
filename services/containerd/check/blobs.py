"""The bytes of blobs: hashed, and fetched anew where they are not what they were."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
from typing import TYPE_CHECKING, cast

from services.common.errors import DataLoss, NotFound, TheseusError
from services.containerd.content.digest import split_digest
from services.containerd.content.files import install
from services.containerd.content.ingest import IngestFile
from services.containerd.content.labels import DISTRIBUTION_SOURCE
from services.containerd.images.reference import Reference
from services.containerd.remotes.remote import RegistryAccess
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentWriter
    from services.containerd.remotes.remote import Registries

_HASHED_AT_ONCE = 4


def blob_path(root: Path, digest: str) -> Path:
    """Where a blob is."""
    return root.joinpath("content", "blobs", *split_digest(digest))


async def find_corrupt(root: Path, digests: Iterable[str]) -> dict[str, str]:
    """What the bytes of blobs are instead, by their digests; those that are right are left out."""
    slots = asyncio.Semaphore(_HASHED_AT_ONCE)

    async def hash_one(digest: str) -> tuple[str, str]:
        async with slots:
            return digest, await asyncio.to_thread(_hash, blob_path(root, digest))

    found = await asyncio.gather(*map(hash_one, digests))
    return {digest: actual for digest, actual in found if actual != digest}


def sources(labelled: Iterable[tuple[str, str, Mapping[str, str]]]) -> dict[str, list[Reference]]:
    """Where blobs came from, by their digests, as labels tell it."""
    found: dict[str, list[Reference]] = {}
    for _, digest, labels in labelled:
        for name, repositories in labels.items():
            if name.startswith(DISTRIBUTION_SOURCE):
                host = name.removeprefix(DISTRIBUTION_SOURCE)
                for repository in filter(None, repositories.split(",")):
                    reference = Reference(host, repository, digest=digest)
                    if reference not in found.setdefault(digest, []):
                        found[digest].append(reference)
    return found


class BlobRepair:
    """Fetches blobs anew, and puts them in the place of those that are damaged.

    Args:
        root: containerd's root.
        registries: where from.
        known_sources: repositories by digest.
    """

    def __init__(
        self, root: Path, registries: Registries, known_sources: Mapping[str, list[Reference]]
    ) -> None:
        self._root = root
        self._registries = registries
        self._sources = known_sources

    async def fetch(self, descriptor: Descriptor) -> str:
        """Fetch a blob and put it in its place; returns where it came from.

        The new file is complete, verified and on the disk before it takes the place of the old one.

        Raises:
            NotFound: no source is known.
            TheseusError: none of the sources has it; the last one's error.
        """
        failure: TheseusError = NotFound("no registry is known to have it")
        for reference in self._sources.get(descriptor.digest, []):
            try:
                await self._fetch_from(reference, descriptor)
            except TheseusError as error:
                failure = error
            else:
                return f"{reference.domain}/{reference.path}"
        raise failure

    async def _fetch_from(self, reference: Reference, descriptor: Descriptor) -> None:
        directory = self._root / "content" / "ingest" / f"check-{secrets.token_hex(8)}"
        file = await asyncio.to_thread(IngestFile, directory, expected=descriptor.digest)
        try:
            remote = self._registries.open(reference, RegistryAccess())
            await remote.fetch(descriptor, cast("ContentWriter", _Intake(file)))
            if file.digest != descriptor.digest:
                raise DataLoss(
                    f"{reference.domain} sent wrong bytes: their digest is {file.digest}"
                )
            await asyncio.to_thread(file.seal)
            target = blob_path(self._root, descriptor.digest)
            await uninterrupted(asyncio.to_thread(install, file.path, target))
        finally:
            file.close()
            await uninterrupted(asyncio.to_thread(shutil.rmtree, directory, True))


class _Intake:
    """As much of a content writer as a fetch needs."""

    def __init__(self, file: IngestFile) -> None:
        self._file = file

    @property
    def offset_bytes(self) -> int:
        return self._file.size_bytes

    async def write(self, data: bytes) -> None:
        await uninterrupted(asyncio.to_thread(self._file.append, data))

    async def truncate(self) -> None:
        await uninterrupted(asyncio.to_thread(self._file.truncate))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        algorithm = path.parent.name
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
